"""Experts that no token came to, by hand."""

from __future__ import annotations

import pytest
import torch

from autoq.calibration.histogram import Histogram
from autoq.calibration.unseen import fill
from autoq.layer import Layer, ModelInfo


def info(count: int) -> ModelInfo:
    layers = (Layer(f"experts.{i}.down_proj", "linear", 2, 2, 2, stack="experts.down_proj") for i in range(count))
    return ModelInfo("A", "causal", "bfloat16", 10, None, (*layers, Layer("other", "linear", 2, 2, 2)), 0)


def statistics(scale: float, **more) -> dict[str, torch.Tensor]:
    return {
        "input_range": torch.tensor([-scale, 2 * scale]),
        "input_peak": torch.tensor([scale, 2 * scale]),
        "input_mean_square": torch.tensor([scale, 3 * scale]),
        "output_square": torch.tensor([scale, 2 * scale]),
        "grad_square": torch.tensor([2 * scale, scale]),
        "step_square": torch.tensor([scale]),
        **more,
    }


def test_one_token_of_the_mean_of_the_others():
    eye = torch.eye(2)
    found = {
        "experts.0.down_proj": statistics(1.0, hessian=eye, input_square=eye),
        "experts.1.down_proj": {},
        "experts.2.down_proj": statistics(3.0, hessian=5 * eye, input_square=torch.diag(torch.tensor([1.0, 0.0]))),
        "other": {},
    }
    fill(info(3), found, {"experts.0.down_proj": 3, "experts.1.down_proj": 0, "experts.2.down_proj": 1, "other": 0})
    own = {name: tensor.tolist() for name, tensor in found["experts.1.down_proj"].items()}
    assert own.pop("input_range") == [-3.0, 6.0]
    assert own.pop("input_peak") == [3.0, 6.0]
    assert own.pop("input_mean_square") == [1.5, 4.5]  # three tokens of 1, 3 and one of 3, 9
    assert own.pop("step_square") == [1.5]
    assert own.pop("output_square") == [1.0, 2.0]  # 1 + 3 and 2 + 6, by four tokens
    assert own.pop("grad_square") == [2.0, 1.0]
    assert own.pop("hessian") == [[2.0, 0.0], [0.0, 2.0]]
    assert own.pop("input_square") == [[1.0, 0.0], [0.0, 0.25]]  # a quarter and three quarters of the trace
    assert own == {}
    assert found["other"] == {}


def test_histograms_are_those_of_all_inputs():
    values = torch.tensor([0.1, -0.4, 0.3]), torch.tensor([5.0, -1.0])
    found = {"experts.2.down_proj": {}, "other": {}}
    for i, each in enumerate(values):
        counts, saliency = Histogram(), Histogram()
        counts.add(each)
        saliency.add(each, torch.ones_like(each) * (i + 1))
        found[f"experts.{i}.down_proj"] = statistics(
            1.0,
            input_square=torch.eye(2),
            input_counts=counts.sums,
            input_saliency=saliency.sums.float(),
            input_exponent=torch.tensor(counts.exponent),
        )
    fill(info(3), found, {"experts.0.down_proj": 3, "experts.1.down_proj": 2, "experts.2.down_proj": 0, "other": 0})
    whole = Histogram()
    whole.add(torch.cat(values))
    own = found["experts.2.down_proj"]
    assert int(own["input_exponent"]) == whole.exponent
    assert torch.equal(own["input_counts"], whole.sums)
    assert float(own["input_saliency"].sum()) == 3 + 2 * 2


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_stay_rows_where_they_are_fewer(rows):
    one, two = torch.tensor([[1.0, 0.0]] * rows), torch.tensor([[0.0, 2.0]])
    found = {
        "experts.0.down_proj": statistics(1.0, inputs=one, input_rows=one),
        "experts.1.down_proj": statistics(1.0, inputs=two, input_rows=two),
        "experts.2.down_proj": {},
        "other": {},
    }
    fill(info(3), found, {"experts.0.down_proj": rows, "experts.1.down_proj": 1, "experts.2.down_proj": 0, "other": 9})
    own = found["experts.2.down_proj"]
    expected = torch.diag(torch.tensor([0.5, 2.0]))  # the mean of the mean squares
    if rows == 1:
        torch.testing.assert_close(own["inputs"].t() @ own["inputs"] / 2, expected)
    else:
        torch.testing.assert_close(own["input_square"], expected)
    assert torch.equal(own["input_rows"], torch.cat([one, two]))


def test_where_nobody_saw_anything_nothing_is_made_up():
    found = {f"experts.{i}.down_proj": {} for i in range(2)} | {"other": {}}
    fill(info(2), found, dict.fromkeys(found, 0))
    assert not any(found.values())


def test_zero_gradients_stay_zero():
    zero = {name: torch.zeros_like(tensor) for name, tensor in statistics(1.0, input_square=torch.eye(2)).items()}
    found = {"experts.0.down_proj": zero, "experts.1.down_proj": {}, "other": {}}
    fill(info(2), found, {"experts.0.down_proj": 5, "experts.1.down_proj": 0, "other": 1})
    assert all(not tensor.any() for tensor in found["experts.1.down_proj"].values())
