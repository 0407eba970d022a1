"""The arithmetic of `autoq.search.cost_model`: shapes that are known, sums by hand, and how costs grow."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.search import cost_model as cost

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


SOFTWARE = cost.Software()


def study(**fields):
    return cost.Study(**{"model": cost.SMOLLM2, "bits": (2.0, 4.0, 8.0), "trials": 1000, **fields})


def test_shapes_of_models_that_are_known():
    assert (len(cost.SMOLLM2.layers), cost.SMOLLM2.searched) == (210, 106_168_320)
    assert cost.SMOLLM2.stored == pytest.approx(269.0e6, rel=0.001)  # as `autoq frontier demo` says
    assert cost.LLAMA_70B.searched + 2 * cost.LLAMA_70B.head == pytest.approx(70.55e9, rel=0.001)
    assert cost.LLAMA_8B.stored == pytest.approx(16.06e9, rel=0.001)


def test_a_pass_takes_what_the_demo_s_study_took():
    recorded = json.loads((BENCHMARKS / "recorded_demo.json").read_text())
    predicted = cost.forward_seconds(cost.SMOLLM2, 2048, cost.TWO_CORES)
    assert predicted == pytest.approx(2 * (106_168_320 + 28_311_552) * 2048 / 0.5e12)
    assert predicted == pytest.approx(recorded["per_pass"], rel=0.05)
    slopes = SOFTWARE.slopes_passes * predicted
    assert slopes == pytest.approx(recorded["per_slopes"], rel=0.1)


def test_sums_by_hand():
    model = cost.Model("two layers", ((4, 8), (2, 4)), 10, 100)
    own = study(model=model, trials=10, tokens=100, given_up=0.5)
    assert cost.bank_bytes(own) == pytest.approx(40 * 14 / 8 * 1.05)
    assert cost.statistics_bytes(own) == 4 * (64 + 16)
    assert cost.quantize_operations(own) == 3 * 2 * (4 * 64 + 2 * 16)
    assert cost.wire_bytes(own, SOFTWARE) == 2 * SOFTWARE.wire_bytes + 800
    each = SOFTWARE.row_bytes + 50 * SOFTWARE.value_bytes + 2 * SOFTWARE.layer_bytes
    assert cost.database_bytes(own, SOFTWARE) == pytest.approx(10 * each)
    rates = cost.Rates("toy", 1e3, 100 + 2 * 40 * 3, 1e2, 1e2, "")
    assert cost.bank_in_memory(own, rates)
    assert cost.trial_seconds(own, rates) == pytest.approx(2 * 50 * 50 / 1e3)
    short = dataclasses.replace(rates, device_bytes=339.0)  # a byte too few: layers are read, 14/3 bits on average
    assert cost.trial_seconds(own, short) == pytest.approx(5.0 + 40 * 14 / 3 / 8 / 1e2)


@given(st.integers(2, 20))
def test_what_grows_with_what(times):
    base = study()
    more = [("trials", study(trials=1000 * times)), ("tokens", study(tokens=2048 * times))]
    database = cost.database_bytes(base, SOFTWARE)
    for name, larger in more:
        grown = cost.database_bytes(larger, SOFTWARE)
        assert (grown == pytest.approx(times * database)) if name == "trials" else (database < grown < times * database)
    assert cost.bank_bytes(study(bits=(2.0, 4.0, 8.0) * times)) == pytest.approx(times * cost.bank_bytes(base))
    assert cost.trial_seconds(more[0][1], cost.TWO_CORES) == cost.trial_seconds(base, cost.TWO_CORES)


def test_a_model_that_no_device_holds_takes_several_or_is_refused():
    large = study(model=cost.LLAMA_70B)
    assert cost.devices_per_worker(large, cost.ONE_H100) == 3
    rows = {what: predicted for what, predicted, _ in cost.plan(large, cost.ONE_H100, SOFTWARE, 8, 8)}
    assert rows["workers"] == "21, 3 devices each"
    with pytest.raises(ValueError, match="needs 3 devices of H100 80 GB a worker; there are 2"):
        cost.plan(large, cost.ONE_H100, SOFTWARE, 1, 2)


def test_the_controller_bounds_what_many_workers_make():
    few, many = (
        {what: predicted for what, predicted, _ in cost.plan(study(), cost.TWO_CORES, SOFTWARE, nodes, 1)}
        for nodes in (1, 5000)
    )
    assert few["trials an hour that the controller takes"] == many["trials an hour that the controller takes"]
    assert few["search"] != many["search"]
    assert all(line.strip() for rows in (few, many) for line in rows.values())


def test_the_table_of_growth_has_a_column_for_each_count():
    assert {len(row) for row in cost.growth(SOFTWARE)} == {6}
