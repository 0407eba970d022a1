"""The Python API on a stored study."""

import sys
import types

import pytest

import autoq as package
from autoq.errors import AutoQError, BadInput, NotFound, UnknownName
from autoq.measurement import Measurement
from autoq.search.observer import Observer
from autoq.spec import Bound, build_spec
from autoq.store import Store
from autoq.study import pick

from .conftest import OBJECTIVES, mixed


@pytest.fixture
def study(database):
    return package.open("demo")


def test_open_names_what_is_near(database):
    with pytest.raises(NotFound, match="did you mean 'demo'"):
        package.open("demi")
    with pytest.raises(NotFound, match="no database"):
        package.open("demo", db="nowhere.db")
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = package.opne


def test_frames_hold_values_and_where_they_came_from(study):
    frame = study.frontier()
    assert list(frame.index) == [0, 1, 3, 4, 5]
    assert frame.loc[3, "size_bytes"] == 80e6
    assert frame.loc[3, "latency_decode_ms"] == 12.3
    assert (frame.loc[5, "latency_decode_ms_kind"], frame.loc[3, "latency_decode_ms_kind"]) == ("predicted", "measured")
    assert frame.loc[1, "baseline"] == "uniform-int8"
    everything = study.trials()
    assert len(everything) == 9
    assert everything.loc[8, "state"] == "failed"


def test_pick_gives_a_trial_with_its_assignment(study):
    chosen = study.pick(max={"size_bytes": 90e6}, best="kl_nats_per_token")
    assert chosen.number == 3
    assert str(chosen.assignment["model.layers.0.q_proj"]) == "rtn-int8-g64"
    assert study.pick(max={"size_bytes": "79.9MB"}).number == 4
    assert study.pick(min={"kl_nats_per_token": 0.3}, best="latency_decode_ms").number == 5
    assert study.pick().number == 0


def test_pick_refuses_what_it_cannot_judge(study):
    with pytest.raises(UnknownName, match="choose from kl_nats_per_token"):
        study.pick(max={"accuracy": 1})
    with pytest.raises(UnknownName, match="no objective of this study 'accuracy'"):
        study.pick(best="accuracy")
    with pytest.raises(BadInput, match="must be a number"):
        study.pick(max={"latency_decode_ms": float("nan")})
    with pytest.raises(AutoQError, match=r"the closest is trial 0 with size_bytes 270\.0 MB"):
        study.pick(min={"size_bytes": "1GB"})
    for value in (None, True):
        with pytest.raises(BadInput, match=f"the limit on size_bytes must be a number .got {value}."):
            study.pick(max={"size_bytes": value})
    with pytest.raises(BadInput, match="limits must map objectives to values"):
        study.pick(max=90e6)
    with pytest.raises(BadInput, match="the limit on kl_nats_per_token must be finite"):
        study.pick(max={"kl_nats_per_token": float("inf")})
    with pytest.raises(BadInput, match="the limits on size_bytes exclude each other"):
        study.pick(max={"size_bytes": 80e6}, min={"size_bytes": 90e6})


def test_a_near_miss_is_told_from_a_hit(study):
    """Both would be 72.00 MB in four digits."""
    with pytest.raises(AutoQError, match="at most 71999999 bytes; the closest is trial 5 with size_bytes 72000000 b"):
        study.pick(max={"size_bytes": 71_999_999})


def test_a_study_without_a_frontier_has_nothing_to_pick(database):
    with Store.open(database) as store:
        store.create_study(package.open("demo").record.study_spec(), OBJECTIVES)
    with pytest.raises(AutoQError, match="study 'demo-2' has no frontier yet"):
        package.open("demo-2").pick()
    with pytest.raises(UnknownName, match="size_byte"):
        package.open("demo-2").pick(max={"size_byte": 1})
    assert package.open("demo-2").frontier().empty


def test_the_figure_is_the_dashboards_own(study):
    figure = study.plot_frontier(y_scale="log")
    traces = {trace.name: trace for trace in figure.data if trace.customdata is not None}
    frontier = traces["frontier, measured on the report part"]
    assert list(frontier.customdata) == [4, 3]
    assert list(frontier.x) == [79.8e6, 80e6]
    assert list(frontier.error_y.array) == [0.006, 0.006]
    assert list(traces["frontier, measured on the search part"].customdata) == [5]
    assert list(traces["dominated"].customdata) == [6]
    # A loss of nothing has no place on a logarithmic axis.
    assert list(traces["baselines, measured on the report part"].customdata) == [2, 1]
    assert figure.layout.xaxis.title.text == "size_bytes"
    assert figure.layout.yaxis.title.text == "kl_nats_per_token (nats/token)"
    linear = study.plot_frontier(y_scale="linear", color="none")
    assert [len(trace.x) for trace in linear.data if trace.name == "baselines, measured on the report part"] == [3]
    with pytest.raises(UnknownName, match="no objective of this study 'accuracy'"):
        study.plot_frontier(x="accuracy")


def test_every_figure_can_be_plotted(study):
    dark = study.plot("layer_map", theme="dark", trial="uniform-int4", by="scheme")
    assert dark.layout.title.text == "demo: layers of uniform-int4"
    assert dark.layout.template.layout.paper_bgcolor == "#15181d"
    with pytest.raises(UnknownName, match="no figure 'layermap'; did you mean 'layer_map'"):
        study.plot("layermap")
    with pytest.raises(UnknownName, match="no theme 'sepia'"):
        study.plot("frontier", theme="sepia")


def test_what_is_not_installed_says_how_to_get_it(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AutoQError, match=r"pandas is not installed: pip install 'autoq\[notebook\]'"):
        study.frontier()


def test_search_is_a_function_and_a_package(database, monkeypatch):
    fake = types.ModuleType("autoq.search.controller")
    fake.create_study = lambda store, spec: store.create_study(spec, OBJECTIVES)
    fake.run_study = lambda store, study_id, observer: store.set_state(study_id, "finished")
    monkeypatch.setitem(sys.modules, "autoq.search.controller", fake)
    for spec in ("encoder", {"model": {"id": "x"}, "name": "encoder"}):
        study = package.search(spec, observer=Observer())
        assert study.record.state == "finished"
        assert study.record.name.startswith("encoder")
    assert package.search.observer.Observer is Observer
    assert study.resume(Observer()) is study


def test_picking_compares_no_reported_value_with_one_that_is_not(database):
    """Trial 1 is the worse one on the search part; easier report text must not make it the choice."""
    kl, size, _ = OBJECTIVES
    with Store.open(database) as store:
        study = store.create_study(build_spec({"model": {"id": "some/model"}, "name": "easier"}), [kl, size])
        for number, value in enumerate((0.10, 0.11)):
            trial = store.start_trial(study.id, number, mixed("keep", "keep", f"rtn-int{number + 2}-g64"), "sampler")
            found = [
                Measurement("kl_nats_per_token", value, "nats/token", "measured", "search"),
                Measurement("size_bytes", 100.0 - number, "bytes", "computed", "search"),
            ]
            assert store.finish_trial(trial.id, 1, found, {}, 1.0, "local")
        easier = Measurement("kl_nats_per_token", 0.05, "nats/token", "measured", "report")
        store.add_measurements(trial.id, [easier])
        frontier = store.frontier(study.id)
        assert [trial.number for trial in frontier] == [0, 1]
        assert pick(study, frontier, {}, {}, None).number == 0
        # A limit is held against what was reported.
        assert pick(study, frontier, {"kl_nats_per_token": 0.07}, {}, None).number == 1


def test_frames_name_ties_and_limits_become_bounds(study, monkeypatch):
    assert dict(study.frontier()["no_better_than"]) == {0: [], 1: [], 3: [4], 4: [], 5: []}
    fake = types.ModuleType("autoq.search.refining")
    fake.refine_study = lambda store, study_id, bounds, n, observer, best: (study_id, bounds, n)
    monkeypatch.setitem(sys.modules, "autoq.search.refining", fake)
    found = study.refine(max={"size_bytes": "90MB"}, min={"latency_decode_ms": 1}, n=3)
    assert found == (1, {"size_bytes": Bound(max=90e6), "latency_decode_ms": Bound(min=1.0)}, 3)
    with pytest.raises(UnknownName):
        study.refine(max={"accuracy": 1})
