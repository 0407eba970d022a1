"""What `pick` and `frontier` say of noise, of gaps, and of the study itself."""

import json
import sys
import types

import pytest
import yaml

from autoq.errors import AutoQError
from autoq.search.sampler_view import PREDICTED
from autoq.spec import Bound
from autoq.store import Store

from .conftest import mixed

LIMIT = ["--max", "size_bytes=100MB", "--best", "kl_nats_per_token"]
OFFERED = mixed("rtn-int8-g64", "rtn-int8-g64", "rtn-int4-g64")


@pytest.fixture
def offers(monkeypatch):
    """A model that offers `OFFERED` with these predictions."""
    fake = types.ModuleType("autoq.search.offers")
    fake.asked = []
    fake.predicted = {"kl_nats_per_token": (0.05, 0.04, 0.06), "size_bytes": (99.9e6, 99.9e6, 99.9e6)}
    fake.assignment = OFFERED

    def offer_json(store, study, bounds, best):
        fake.asked.append((study.name, bounds, best))
        if fake.assignment is None:
            raise AutoQError("no assignment keeps the bounds")
        known = store.find(study.id, fake.assignment.hash)
        predicted = {
            name: {"value": value, "low": low, "high": high, "kind": "predicted" if low < high else "computed"}
            for name, (value, low, high) in fake.predicted.items()
        }
        trial = None if known is None else known.number
        return {"predicted": predicted, "assignment": fake.assignment.to_dict(), "trial": trial}

    fake.offer_json = offer_json
    monkeypatch.setitem(sys.modules, "autoq.search.offers", fake)
    return fake


@pytest.fixture
def model(offers, database):
    """The same, for a study that has the sensitivities that it needs."""
    with Store.open(database) as store:
        store.put_table(1, "sensitivity", {"model.layers.0.q_proj": {"rtn-int4-g64": 0.1}})
    return offers


@pytest.mark.parametrize("command", ["pick", "frontier"])
@pytest.mark.parametrize(
    ("limits", "fragment"),
    [
        (["--max", "kl_nats_per_token=inf"], "must be finite (got 'inf'); leave it out for none"),
        (["--min", "latency_decode_ms=9", "--max", "latency_decode_ms=8"], "exclude each other: at least 9, at most 8"),
    ],
)
def test_limits_that_mean_nothing_are_refused(autoq, model, command, limits, fragment):
    result = autoq(command, "demo", *limits)
    assert (result.exit_code, result.stdout) == (2, "")
    assert fragment in result.stderr


def test_the_offer_stands_behind_what_was_picked(autoq, model):
    """Whoever reads the first assignment of the text reads that of the trial."""
    shown = autoq("pick", "demo", *LIMIT).stdout
    assert list(yaml.safe_load(shown))[-2:] == ["assignment", "offer"]


def test_ties_are_in_the_documents(autoq):
    trials = json.loads(autoq("frontier", "demo", "--json").stdout)["trials"]
    assert {trial["number"]: trial["no_better_than"] for trial in trials} == {0: [], 1: [], 3: [4], 4: [], 5: []}


def test_pick_names_what_its_choice_is_no_better_than(autoq):
    result = autoq("pick", "demo", "--max", "size_bytes=80MB", "--json")
    assert json.loads(result.stdout)["no_better_than"] == [4]
    assert result.stderr == "beyond noise trial 3 is no better than 4 (79.80 MB)\n"
    # beyond the limits there is nothing to choose
    assert autoq("pick", "demo", "--max", "size_bytes=79.9MB").stderr == ""
    assert yaml.safe_load(autoq("pick", "demo", "--max", "size_bytes=80MB").stdout)["no_better_than"] == [4]


def test_a_gap_below_the_bound_gets_an_offer(autoq, model):
    result = autoq("pick", "demo", *LIMIT, "--json")
    document = json.loads(result.stdout)
    assert document["number"] == 3
    assert document["offer"]["assignment"] == OFFERED.to_dict()
    assert document["offer"]["predicted"]["kl_nats_per_token"] == {
        "value": 0.05,
        "low": 0.04,
        "high": 0.06,
        "kind": "predicted",
    }
    assert model.asked == [("demo", {"size_bytes": Bound(max=100e6)}, "kl_nats_per_token")]
    assert result.stderr.splitlines()[1] == (
        "beyond trial 3 an assignment is predicted, not measured, to have kl_nats_per_token 0.05000 nats/token "
        "(0.04000 to 0.06000), size_bytes 99.90 MB; measure it: the same command with --refine 1"
    )


@pytest.mark.parametrize(
    "limits",
    [
        ["--max", "size_bytes=81MB"],  # within 2 %
        ["--max", "size_bytes=1GB"],  # no point is better than the one that is picked
        ["--max", "kl_nats_per_token=0.2"],
        [],
    ],
)
def test_no_gap_no_offer(autoq, model, limits):
    document = json.loads(autoq("pick", "demo", *limits, "--best", "kl_nats_per_token", "--json").stdout)
    assert "offer" not in document
    assert model.asked == []


@pytest.mark.parametrize(("size", "shown"), [(78e6, True), (79e6, False), (81e6, False)])
def test_the_smallest_within_a_bound_on_the_loss_is_offered(autoq, model, size, shown):
    model.predicted = {"kl_nats_per_token": (0.19, 0.18, 0.2), "size_bytes": (size,) * 3}
    limits = ["--max", "kl_nats_per_token=0.2", "--best", "size_bytes"]
    document = json.loads(autoq("pick", "demo", *limits, "--json").stdout)
    # Less than 2 % below the 79.8 MB that are picked is not worth a measurement.
    assert (document["number"], "offer" in document) == (4, shown)
    assert model.asked == [("demo", {"kl_nats_per_token": Bound(max=0.2)}, "size_bytes")]


@pytest.mark.parametrize("case", ["worse", "known", "nothing"])
def test_an_offer_must_be_new_and_better(autoq, model, case):
    if case == "worse":
        model.predicted = model.predicted | {"kl_nats_per_token": (0.18, 0.1, 0.2)}
    model.assignment = {"worse": OFFERED, "known": mixed("rtn-int3-g64", "rtn-int3-g64", "rtn-int8-g64")}.get(case)
    result = autoq("pick", "demo", *LIMIT, "--json")
    assert result.exit_code == 0, result.stderr
    assert "offer" not in json.loads(result.stdout)
    assert ("nothing is offered between trial 3 and the bounds" in result.stderr) == (case == "nothing")


def test_a_study_without_sensitivities_has_no_model(autoq, offers):
    assert "offer" not in json.loads(autoq("pick", "demo", *LIMIT, "--json").stdout)
    assert offers.asked == []


@pytest.fixture
def refining(monkeypatch):
    fake = types.ModuleType("autoq.search.refining")
    fake.asked = []
    fake.refine_study = lambda store, study_id, bounds, n, observer, best: fake.asked.append((study_id, bounds, n))
    monkeypatch.setitem(sys.modules, "autoq.search.refining", fake)
    return fake


def test_refine_measures_before_it_picks(autoq, refining):
    result = autoq(
        "pick", "demo", "--max", "size_bytes=80MB", "--min", "latency_decode_ms=1", "--refine", "2", "--json"
    )
    assert result.exit_code == 0, result.stderr
    bounds = {"size_bytes": Bound(max=80e6), "latency_decode_ms": Bound(min=1.0)}
    assert refining.asked == [(1, bounds, 2)]
    assert json.loads(result.stdout)["number"] == 3


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--refine", "1"], "--refine needs a limit"),
        (["--refine", "0", "--max", "size_bytes=80MB"], "--refine"),
        (["--refine", "1", "--max", "size_bytes=8MB", "--min", "size_bytes=9MB"], "the limits on size_bytes exclude"),
        (["--refine", "1", "--max", "accuracy=1"], "no measured objective 'accuracy'"),
    ],
)
def test_refine_refuses_what_it_cannot_do(autoq, refining, arguments, fragment):
    result = autoq("pick", "demo", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert fragment in result.stderr
    assert refining.asked == []


def test_a_running_study_is_not_refined(autoq, database):
    with Store.open(database) as store:
        store.set_state(1, "running")
    result = autoq("pick", "demo", "--max", "size_bytes=80MB", "--refine", "1")
    assert result.exit_code == 2
    assert result.stderr.endswith("study 'demo' is running and cannot be refined; wait for its end\n")


OPTIMISM = {
    "objective": "kl_nats_per_token",
    "ratio": 1.0312,
    "stderr": 0.0104,
    "frontier": {"3": 1.04, "4": 1.02},
    "baselines": {"1": 1.0, "2": 1.0},
}
LINE = (
    "optimism: kl_nats_per_token of 2 frontier points, report against search part, "
    "is 1.031 ±0.010 × that of 2 baselines"
)


def test_optimism_and_the_samplers_view_are_shown(autoq, database):
    view = {"trials": 12, "spearman": 0.9, "median_ratio": 1.25}
    with Store.open(database) as store:
        store.put_table(1, "optimism", OPTIMISM)
        store.put_table(1, "sampler_view", view)
    shown = " ".join(autoq("frontier", "demo").stdout.split())
    assert LINE in shown
    assert "sampler's own predictions: rank correlation 0.90, measured / predicted 1.25 (12 trials)" in shown
    document = json.loads(autoq("frontier", "demo", "--json").stdout)
    assert (document["optimism"], document["sampler_view"]) == (OPTIMISM, view)
    (study,) = json.loads(autoq("studies", "--json").stdout)["studies"]
    assert (study["optimism"], study["sampler_view"]) == (OPTIMISM, view)
    assert "demo: sampler's own predictions" in autoq("studies").stdout


def test_one_point_is_not_points(autoq, database):
    with Store.open(database) as store:
        store.put_table(1, "optimism", OPTIMISM | {"frontier": {"3": 1.04}, "baselines": {"1": 1.0}})
    shown = " ".join(autoq("frontier", "demo").stdout.split())
    assert "of 1 frontier point, report" in shown
    assert "that of 1 baseline" in shown
    assert "baselines" not in shown


def test_a_study_without_numbers_of_itself_says_nothing(autoq):
    document = json.loads(autoq("frontier", "demo", "--json").stdout)
    assert (document["optimism"], document["sampler_view"]) == (None, None)
    assert "optimism" not in autoq("frontier", "demo").stdout
    assert "sampler" not in autoq("studies").stdout


def test_a_running_study_is_viewed_as_it_stands(autoq, database):
    from autoq.measurement import Measurement

    from .conftest import OBJECTIVES

    with Store.open(database) as store:
        for i, (predicted, measured) in enumerate([(0.1, 0.2), (0.2, 0.4), (0.3, 0.6)]):
            assignment = mixed("keep", "keep", f"rtn-int{i + 5}-g64")
            trial = store.start_trial(1, 9 + i, assignment, "sampler", None, {PREDICTED: predicted})
            values = [Measurement(name, measured, unit, "measured", "search", 0.1) for name, unit, _ in OBJECTIVES]
            assert store.finish_trial(trial.id, 1, values, {}, 0.1, "local")
        store.set_state(1, "running")
    view = json.loads(autoq("frontier", "demo", "--json").stdout)["sampler_view"]
    assert view == {"trials": 3, "spearman": None, "median_ratio": pytest.approx(2.0)}
