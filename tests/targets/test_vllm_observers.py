"""Calibrated ranges in compressed-tensors: the observer's number is what is computed with and what is written."""

import pytest
import torch

from autoq import plugins
from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import FP8, SYMMETRIC_INT8, input_range
from autoq.layer import Layer
from autoq.scheme import OBSERVERS, Float, parse_scheme
from autoq.targets import Target
from autoq.targets._compressed_tensors import input_scale
from autoq.targets._vllm_rules import fused_differ, layout

VLLM = plugins.load("targets", "vllm", Target)
COUNTS = Histogram()
COUNTS.add(torch.randn(4000, generator=torch.Generator().manual_seed(0)).clamp(-3.0, 4.0))
RANGE = {
    "input_range": torch.tensor([-3.0, 4.0]),
    "input_counts": COUNTS.sums,
    "input_exponent": torch.tensor([COUNTS.exponent]),
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("weights", ["rtn-int8-channel-sym", "rtn-fp8-channel"])
def test_the_stored_step_is_that_of_the_observer_s_range(weights, name):
    scheme = parse_scheme(f"{weights}-{name}")
    levels, codes = (FP8, 448) if isinstance(scheme, Float) else (SYMMETRIC_INT8, 127)
    largest = input_range(scheme, RANGE, levels).abs().max()
    assert input_scale(scheme, RANGE) == (largest / codes).bfloat16()
    x = torch.linspace(-8, 8, 300)
    assert float(VLLM.activation(scheme, RANGE)(x)[-1]) == pytest.approx(float(largest), rel=2**-8)


def test_layers_that_run_as_one_share_an_observer():
    """Of their calibrated scales vLLM takes the largest."""
    layers = {name: Layer(name, "linear", 96, 128, 2, fusion_group="attn.q+k") for name in ("q", "k")}

    def differ(one, other):
        return fused_differ(layers, {"q": parse_scheme(one), "k": parse_scheme(other)})

    assert differ("rtn-int8-channel-sym-a8mse", "rtn-int8-channel-sym-a8mse") is None
    assert "must share one scheme" in differ("rtn-int8-channel-sym-a8mse", "rtn-int8-channel-sym-a8pct")


def test_the_files_do_not_tell_who_found_a_range():
    texts = [layout(parse_scheme(f"rtn-int8-channel-sym-{name}")) for name in OBSERVERS]
    assert set(texts) == {"int8-channel-sym-a8static"}
