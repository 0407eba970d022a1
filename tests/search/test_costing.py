"""What a study is predicted to cost: counts by hand, what grows with what, and stored trials in place of rates."""

import pytest

from autoq.errors import BadInput
from autoq.measurement import Measurement
from autoq.models import inspect
from autoq.scheme import parse_scheme
from autoq.search import costing
from autoq.search.samplers import SLOPES
from autoq.search.setup import create_study
from autoq.spec import build_spec
from autoq.store import Store

SCHEMES = ("rtn-int4-g32", "hqq-int4-g32")
PASS, BACKWARD = 3.0, 5.0  # seconds that the stored trials take


def spec_of(folder, **changes):
    spec = {
        "name": "planned",
        "model": {"id": str(folder)},
        "data": {"calibration_tokens": 64, "search_tokens": 128, "report_tokens": 256, "window_tokens": 32},
        "target": {"name": "generic"},
        "space": {"schemes": [*SCHEMES, "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 40, "stop_confidence": None},
        "workers": {"cpus": 1},
    }
    return build_spec({**spec, **{name: {**spec.get(name, {}), **own} for name, own in changes.items()}})


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def plain(folder):
    return costing.predict(spec_of(folder))


@pytest.fixture
def store(folder, tmp_path):
    """A study whose trials took `PASS` seconds a pass, some of them given up at half, and `BACKWARD` for slopes."""
    with Store.open(str(tmp_path / "autoq.db")) as store:
        spec = spec_of(folder, budget={"stop_confidence": 0.99})
        study = create_study(store, spec)
        space = costing.pose(spec).space
        for number in range(8):
            passes, slopes = (1.0, True) if number < 2 else (0.5, False) if number < 4 else (1.0, False)
            assignment = space.assignment(
                [number % 2, (number // 2) % 2, (number // 4) % 2, *[2] * (len(space.variables) - 3)]
            )
            trial = store.start_trial(study.id, number, assignment, "sampler", None, {SLOPES: {}} if slopes else {})
            value = Measurement(
                "kl_nats_per_token",
                0.5,
                "nats/token",
                "measured",
                "search",
                0.01,
                128,
                detail={"forward_passes": passes},
            )
            size = Measurement("size_bytes", 1e5, "bytes", "computed", "search")
            store.finish_trial(trial.id, 1, [value, size], {}, PASS * passes + BACKWARD * slopes, "local")
        yield store


def test_counts_are_those_of_the_model(plain, folder):
    info = inspect(spec_of(folder).model)
    problem = costing.pose(spec_of(folder))
    planned = costing.baselines(problem)
    made = {(name, parse_scheme(text)) for name in problem.space.layers for text in SCHEMES}
    made |= {(layer.name, proposal.assignment[layer.name]) for proposal in planned for layer in info.layers}
    made = {(name, scheme) for name, scheme in made if str(scheme) != "keep"}
    assert len(made) > len(SCHEMES) * len(problem.space.layers)  # baselines have schemes of their own
    by_hand = sum(info.layer(name).nbytes(scheme) + costing.ENTRY_BYTES for name, scheme in made)
    assert (plain["the bank on disk"].value, plain["the bank on disk"].basis) == (by_hand, "computed")
    model = costing._model(problem)
    run = sum(layer.parameters for layer in info.layers if layer.kind != "embedding")
    assert model.active == run
    assert model.stored == sum(layer.parameters * layer.dtype_bytes for layer in info.layers) + problem.info.other_bytes
    steps = ("starting", "calibration", "quantizing the bank, CPU", "timing layers", "search", "report")
    assert plain["all of it"].value == pytest.approx(sum(plain[name].value for name in steps))
    assert all(figure.value >= 0 for figure in plain.figures)
    assert plain["timing layers"].value == 0  # nothing is timed on this target


def test_what_grows_with_what(folder, plain, monkeypatch):
    pace = costing.Pace("assumed", "one millisecond a token", 1e-3, 1.0)
    monkeypatch.setattr(costing, "_pace", lambda problem: pace)
    base = costing.predict(spec_of(folder))
    assert base["a trial"].value == pytest.approx(0.128)
    assert base["a trial with slopes"].value == pytest.approx(1.128)
    # 40 trials and the reference's answers, 16 of them with slopes
    assert base["all trials, worker time"].value == pytest.approx(41 * 0.128 + 16)
    more = costing.predict(spec_of(folder, budget={"trials": 80}))
    assert more["all trials, worker time"].value == pytest.approx(81 * 0.128 + 16)
    grown, before = (each["database"].value - costing.EMPTY_BYTES for each in (more, base))
    assert grown == pytest.approx(2 * before)
    several = costing.predict(spec_of(folder, workers={"executor": "ray", "count": 4}))
    assert several["search"].value == pytest.approx(base["all trials, worker time"].value / 4)
    random = costing.predict(spec_of(folder, sampler={"name": "random"}))
    assert random["all trials, worker time"].value == pytest.approx(41 * 0.128)
    assert all(figure.what != "a trial with slopes" for figure in random.figures)


def test_stored_trials_come_before_rates(folder, store):
    found = costing.predict(spec_of(folder, data={"search_tokens": 64}, budget={"stop_confidence": 0.99}), store)
    assert found.against == "planned"
    assert found["a trial"].basis == "measured"
    share = (6 + 2 * 0.5) / 8  # of its tokens that a trial evaluates
    assert found["a trial"].value == pytest.approx(PASS / 2 * share)
    assert found["a trial with slopes"].value == pytest.approx((PASS + BACKWARD) / 2)
    assert found["report"].value == pytest.approx((found_points(found) + 1) * 256 * PASS / 128)
    patient = costing.predict(spec_of(folder, data={"search_tokens": 64}), store)  # gives nothing up
    assert patient["a trial"].value == pytest.approx(PASS / 2)


def found_points(found):
    return int(found["report"].how.split()[0])


def test_a_study_of_something_else_tells_nothing(folder, store):
    other = spec_of(folder, workers={"cpus": 2})
    assert costing.predict(other, store).against is None
    with pytest.raises(BadInput, match=r"^--against planned: its workers\.cpus is 1, and this study's is 2$"):
        costing.predict(other, store, "planned")
    create_study(store, spec_of(folder).model_copy(update={"name": "empty"}))
    assert costing.predict(spec_of(folder), store).against == "planned"  # the later one has no trials
    with pytest.raises(BadInput, match=r"^--against empty: fewer than 4 of its trials say how long they took$"):
        costing.predict(spec_of(folder), store, "empty")


def test_every_figure_says_what_it_rests_on(plain):
    document = plain.to_json()
    assert document["kind"] == "predicted"
    for figure in document["figures"]:
        assert figure["kind"] == "predicted"
        assert figure["basis"] in ("computed", "measured", "probed", "assumed")
        assert figure["unit"] in ("s", "bytes")
        assert figure["how"]
    assert len(document["assumptions"]) >= 4


def test_methods_with_statistics_go_by_a_rate_that_is_named(folder, plain):
    gptq = costing.predict(spec_of(folder, space={"schemes": ["gptq-int4-g32", "keep"]}))
    assert gptq["quantizing the bank, CPU"].basis == "assumed"
    assert any("gptq's operations" in line for line in gptq.assumptions)
    assert plain["quantizing the bank, CPU"].basis == "probed"
    assert not any("gptq's operations" in line for line in plain.assumptions)
