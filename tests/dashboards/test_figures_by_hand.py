"""Figures of small studies, against what is worked out by hand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from autoq.dashboards import drawing, labels, palette
from autoq.dashboards.study_view import View
from autoq.display.compare import gains
from autoq.display.ties import stored_ties
from autoq.errors import BadInput, NotFound
from autoq.layer import Layer


def traces(figure):
    """Traces with points of trials, by name."""
    return {trace["name"]: trace for trace in figure.plotly["data"] if "customdata" in trace}


def drawn(figure):
    """Trial -> (x, y) of every point, in the order of drawing."""
    found = {}
    for trace in figure.plotly["data"]:
        if "customdata" in trace:
            across, up = drawing.unpacked(trace["x"]), drawing.unpacked(trace["y"])
            for number, x, y in zip(drawing.unpacked(trace["customdata"]), across, up, strict=True):
                assert number not in found
                found[int(number)] = (x, y)
    return found


# The frontier


@pytest.mark.parametrize("name", ["ordinary", "two objectives", "maximized", "negative", "infeasible", "one"])
def test_points_are_the_rows_of_the_table(views, name):
    figure = views(name).figure("frontier", x_scale="linear", y_scale="linear", stopped=True)
    x, y = figure.plotly["layout"]["meta"]["x"], figure.plotly["layout"]["meta"]["y"]
    rows = zip(*(figure.table.column(column) for column in ("trial", x, y)), strict=True)
    assert list(drawn(figure).items()) == [(number, (a, b)) for number, a, b in rows]


def test_what_is_hidden_on_a_logarithmic_axis_is_said(views):
    figure = views("ordinary").figure("frontier")
    assert figure.plotly["layout"]["yaxis"]["type"] == "log"
    assert "unquantized (1.050e-06 nats/token)" in figure.note
    assert "unquantized" in figure.table.column("name")
    low, high = figure.plotly["layout"]["yaxis"]["range"]
    assert -3 < low < high < 0
    assert figure.plotly["layout"]["xaxis"]["range"][1] < 269e6


def test_a_loss_of_nothing_is_in_the_table(views):
    figure = views("zeros").figure("frontier", y_scale="log")
    assert figure.plotly["layout"]["yaxis"]["type"] == "linear"
    assert len(figure.table.rows) == 5


def test_states_are_apart_and_stopped_trials_wait_to_be_asked_for(views):
    figure = views("ordinary").figure("frontier")
    assert "stopped early, estimated" not in traces(figure)
    (cross,) = (t for t in figure.plotly["data"] if t.get("name") == "infeasible")
    assert cross["marker"]["symbol"] == "x-thin"
    assert cross["customdata"] == [18]
    with_stopped = traces(views("ordinary").figure("frontier", stopped="true"))
    assert with_stopped["stopped early, estimated"]["customdata"] == [19]


def test_predictions_are_open_and_reported_values_filled(views):
    figure = views("ordinary").figure("frontier", x="latency_decode_ms")
    by_name = traces(figure)
    assert by_name["frontier, partly predicted"]["marker"]["symbol"] == "circle-open"
    assert by_name["frontier, measured on the report part"]["marker"]["symbol"] == "circle"
    reported = by_name["frontier, measured on the report part"]
    assert reported["error_y"]["array"] == pytest.approx([0.01 * y for y in reported["y"]], rel=0.06)


def test_points_that_no_one_can_tell_apart_are_those_of_the_command_line(views, database):
    view, store = views("ordinary"), database[0]
    known = stored_ties(store, view.study, store.frontier(view.id))
    assert view.ties() == known
    told = dict(zip(*(view.figure("frontier").table.column(c) for c in ("trial", "no better than")), strict=True))
    for number, others in known.items():
        assert told[number] == (", ".join(map(str, others)) or None)


@pytest.mark.parametrize(
    ("directions", "kept", "shape"),
    [
        (("minimize", "minimize"), [(1.0, 3.0), (2.0, 1.0)], "hv"),
        (("minimize", "maximize"), [(1.0, 3.0), (4.0, 5.0)], "hv"),
        (("maximize", "minimize"), [(2.0, 1.0), (4.0, 2.0)], "vh"),
        (("maximize", "maximize"), [(4.0, 5.0)], "vh"),
    ],
)
def test_staircases_of_all_directions(directions, kept, shape):
    points = [(1.0, 3.0), (2.0, 1.0), (4.0, 5.0 if directions[1] == "maximize" else 2.0), (2.0, 1.0)]
    if directions == ("minimize", "minimize"):
        points = [(1.0, 3.0), (2.0, 1.0), (4.0, 2.0), (2.0, 1.0)]
    x, y = np.array(points).T
    indices = drawing.staircase(x, y, directions)
    assert [points[index] for index in indices] == kept
    assert drawing.step_shape(directions[0]) == shape


def test_many_points_are_thinned_packed_and_small(maker):
    study = maker.study()
    for number in range(60):
        maker.trial(study, number, (1.0 + number / 7 % 1, 1e8 + number))
    figure = View(maker.store, study).figure("frontier", limit=10)
    (dominated,) = (t for t in figure.plotly["data"] if t.get("name") == "dominated")
    assert len(dominated["x"]) == 10
    assert "more dominated trials are not drawn" in figure.note
    numbers = np.arange(drawing.PACKED) * 1.1
    packed = drawing.array(numbers)
    assert packed["dtype"] == "f8"
    assert drawing.unpacked(packed) == numbers.tolist()
    assert drawing.array(np.arange(drawing.PACKED))["dtype"] == "i4"


def test_labels_keep_clear_of_each_other():
    dots = [(0.5, 0.5), (0.52, 0.52), (0.5, 0.55), (0.98, 0.5)]
    places = labels.place([(x, y, "uniform-int4") for x, y in dots], dots)
    assert len(places) == 4
    assert "left" in places[3]
    assert len(set(places[:3])) > 1


def test_categories_are_never_the_same():
    long = [f"{'x' * 60}{end}" for end in ("a", "b", "a", "a")]
    found = drawing.distinct([*long, "<b>", "<b>"], 20)
    assert len(set(found)) == 6
    assert found[0] == "…" + "x" * 18 + "a"
    assert found[4:] == ["&lt;b&gt;", "&lt;b&gt;… (2)"]
    assert all(len(name) <= 20 for name in found[:4])


# Layers


def test_the_layer_map_says_every_layer(views):
    view = views("ordinary")
    figure = view.figure("layer_map", trial=5)
    assignment = view.trial(5).assignment
    assert dict(zip(figure.table.column("layer"), figure.table.column("scheme"), strict=True)) == assignment.to_dict()
    (trace,) = figure.plotly["data"]
    assert trace["y"] == ["0", "1", "2", "lm_head"]
    assert trace["x"] == ["self_attn.<br>q_proj", "mlp.<br>down_proj", "outside the<br>blocks"]
    empty = [[value is None for value in row] for row in trace["z"]]
    assert empty == [[False, False, True]] * 3 + [[True, True, False]]
    assert "16 ⚭" in trace["text"][3][2]
    sizes = [view.layers[name].nbytes(assignment[name]) for name in figure.table.column("layer")]
    assert figure.table.column("size") == sizes


def test_a_duplicate_stands_for_the_trial_that_has_its_values(views):
    assert views("ordinary").figure("layer_map", trial=21).title == "ordinary: layers of trial 5"
    assert views("ordinary").figure("layer_map", trial="uniform-int4").title == "ordinary: layers of uniform-int4"
    with pytest.raises(NotFound, match="its trials are 0 to 22"):
        views("ordinary").figure("layer_map", trial=99)
    with pytest.raises(NotFound, match="or a baseline: uniform-int4, uniform-int8, unquantized"):
        views("ordinary").figure("layer_map", trial="uniform-int2")


def test_differences_add_up(views):
    view = views("ordinary")
    figure = view.figure("diff_map", a=4, b=11)
    a, b = view.trial(4).assignment, view.trial(11).assignment
    sizes = [sum(view.layers[name].nbytes(side[name]) for name in side) for side in (a, b)]
    assert sum(figure.table.column("change")) == sizes[1] - sizes[0]
    losses = [sum(view.sensitivity[n].get(str(side[n]), 0.0) for n in side if n != "lm_head") for side in (a, b)]
    assert sum(figure.table.column("predicted change of loss")) == pytest.approx(losses[1] - losses[0])
    back = view.figure("diff_map", a=11, b=4)
    assert [-value for value in back.table.column("change")] == figure.table.column("change")
    assert view.figure("diff_map", a=4, b=4).note == "The two have the same assignment."


def test_the_price_of_a_layer_by_hand(views):
    """128 × 64 weights: int4-g64 4,096 + 256 + 128 bytes (a zero point and its padding a row), int8 8,192 + 256."""
    figure = views("ordinary").figure("which_layers_pay", trial="uniform-int8")
    row = dict(zip([c.title for c in figure.table.columns], figure.table.rows[0], strict=True))
    # number 1 of the 3^6 assignments: the first layer as int8, all others as int4
    assert row["layer"] == "model.layers.0.self_attn.q_proj"
    assert (row["scheme"], row["instead of"]) == ("rtn-int8-channel-sym", "rtn-int4-g64")
    assert row["paid for"] == 8448 - 4480
    assert row["loss avoided"] == pytest.approx((0.01 - 0.0001) / (8448 - 4480) * 1e6)
    assert row["next"] == "keep"
    assert row["would avoid"] == pytest.approx(0.0001 / (16384 - 8448) * 1e6)
    assert len(figure.table.rows) == 1


def test_sensitivities_are_those_of_the_table(views):
    view = views("ordinary")
    figure = view.figure("sensitivity_map", scheme="rtn-int8-channel-sym")
    told = dict(zip(figure.table.column("layer"), figure.table.column("predicted loss"), strict=True))
    assert told == {name: own["rtn-int8-channel-sym"] for name, own in view.sensitivity.items()}
    assert sum(figure.table.column("share of all")) == pytest.approx(1)
    assert view.figure("sensitivity_map").title.endswith("rtn-int4-g64")


def test_what_stays_as_it_is_is_no_scheme_to_be_sensitive_to():
    from autoq.dashboards.losses import lightest

    layers = {name: Layer(name, "linear", 64, 64, 2) for name in ("a", "b")}
    losses = {"a": {"keep": 0.0, "rtn-int4-g64": 0.1}, "b": {"keep": 0.0}}
    assert lightest(SimpleNamespace(sensitivity=losses, layers=layers)) == "rtn-int4-g64"
    only = {"a": {"keep": 0.0}}
    assert lightest(SimpleNamespace(sensitivity=only, layers=layers)) == "keep"


# The search


def test_the_samplers_view_is_that_of_the_command_line(views, database):
    from autoq.search.sampler_view import ENDED, sampler_view

    view, store = views("ordinary"), database[0]
    known = sampler_view(store.trials(view.id, states=ENDED), "kl_nats_per_token")
    figure = view.figure("predicted_measured")
    assert str(known)[1:] in figure.note
    assert len(figure.table.rows) == known.trials
    latency = view.figure("predicted_measured", objective="latency_decode_ms")
    assert "predicted within 4.8% (median of 8 timed)" in latency.note
    assert latency.table.column("predicted") == pytest.approx([m / 1.05 for m in latency.table.column("measured")])


def test_progress_counts_every_trial_once(views):
    figure = views("ordinary").figure("progress")
    last = dict(zip([column.title for column in figure.table.columns], figure.table.rows[-1], strict=True))
    counts = [last[state] for state in ("complete", "stopped early", "duplicate (no cost)", "failed")]
    assert counts == [19, 1, 1, 1]
    assert "1 running" in figure.note
    assert "5% of those evaluated were stopped early" in figure.note


def test_savings_are_those_of_the_command_line(views, database):
    view, store = views("ordinary"), database[0]
    complete = store.trials(view.id, states=("complete",))
    known = gains(store.frontier(view.id), [t for t in complete if t.baseline], view.study.objectives)
    figure = view.figure("savings")
    assert known
    assert str(known[0])[1:] in figure.note
    assert {(row[0], row[1]) for row in figure.table.rows} == {(g.point.number, g.baseline.baseline) for g in known}


# Comparison


def test_at_equal_size_the_better_staircase_wins(maker):
    first, second = maker.study(name="first"), maker.study(name="second")
    for number, point in enumerate([(0.4, 1e8), (0.2, 2e8)]):
        maker.trial(first, number, point)
    for number, point in enumerate([(0.5, 1e8), (0.1, 1.5e8)]):
        maker.trial(second, number, point)
    figure = View(maker.store, first).figure("compare", studies="second")
    assert figure.table.rows == (
        (1e8, 0.4, 0.5, "first"),
        (1.5e8, 0.4, 0.1, "second"),
        (2e8, 0.2, 0.1, "second"),
    )
    assert [t["name"] for t in figure.plotly["data"] if "customdata" in t] == ["first", "second"]
    symbols = {tuple(t["marker"]["symbol"]) for t in figure.plotly["data"] if "customdata" in t}
    assert symbols == {("circle", "circle"), ("square", "square")}


def test_what_cannot_stand_beside_each_other_is_refused_by_name(maker):
    first = maker.study(name="first")
    maker.study(name="other-model", model={"id": "demo:minilm"})
    maker.study((("kl_nats_per_token", "bits", "minimize"), ("size_bytes", "bytes", "minimize")), name="other-unit")
    maker.study((("size_bytes", "bytes", "minimize"),), name="no-loss")
    view = View(maker.store, first).refresh()
    with pytest.raises(BadInput, match="'other-model' is of model 'demo:minilm', 'first' of 'demo:smollm2'"):
        view.figure("compare", studies=["other-model"])
    with pytest.raises(BadInput, match="'other-unit' has kl_nats_per_token in 'bits' and 'first' in 'nats/token'"):
        view.figure("compare", studies=["other-unit"])
    with pytest.raises(BadInput, match="'no-loss' has no kl_nats_per_token; it has size_bytes"):
        view.figure("compare", studies=["no-loss"])
    with pytest.raises(NotFound, match="no study 'nowhere'"):
        view.figure("compare", studies=["nowhere"])
    with pytest.raises(BadInput, match="at most 7 studies"):
        view.figure("compare", studies=["first"] * 8)


# Colours


@pytest.mark.parametrize("theme", palette.THEMES)
def test_colours_stand_out_from_the_ground(theme):
    for color in (*palette.CATEGORIES, palette.GREY):
        assert palette.contrast(color, palette.GROUND[theme]) >= 3 or color == palette.PURPLE
    assert palette.contrast(palette.PURPLE, palette.GROUND[theme]) >= 2.9
    assert palette.contrast(palette.INK[theme], palette.GROUND[theme]) >= 7


def test_text_in_cells_can_be_read():
    for place in np.linspace(0, 1, 101):
        for stops in (None, palette.DIVERGING):
            color = palette.at(float(place), stops)
            assert palette.contrast(palette.ink_on(color), color) >= 4.5
    assert palette.contrast("#ffffff", "#000000") == pytest.approx(21)


def test_an_empty_frontier_says_why(views):
    assert views("empty").figure("frontier").note == "No trial is complete yet."
    note = views("failed").figure("frontier").note
    assert re.fullmatch(r"No trial is complete: (1 has|\d+ have) failed\.", note), note


def test_the_ticks_of_a_single_point_can_be_told_apart(views):
    figure = views("one").figure("frontier")
    assert len(figure.table.rows) == 1
    for axis in ("xaxis", "yaxis"):
        low, high = figure.plotly["layout"][axis]["range"]
        assert low < high, axis
