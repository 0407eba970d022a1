"""Inputs as llama.cpp's kernels round them, against numbers worked out by hand and llama.cpp itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoq import plugins
from autoq.methods import Method
from autoq.models import load
from autoq.scheme import Gguf
from autoq.spec import ModelSpec
from autoq.targets import Target
from autoq.targets._gguf_file import write
from autoq.targets._llama_cpp_activations import blocks_of_32, blocks_of_256
from autoq.targets._llama_cpp_engine import Engine

TARGET = plugins.load("targets", "llama_cpp", Target)
TOKENS = [1, 200, 30, 4, 77, 250, 5, 5, 101, 9]


def test_a_block_of_32_by_hand():
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1], x[0, 2], x[0, 40] = 127.0, -63.5, 0.4, 3.0
    # d = 1: codes 127, round-half-even(-63.5) = -64, 0; the second block has d = 3/127 in float16.
    expected = torch.zeros(1, 64)
    expected[0, 0], expected[0, 1] = 127.0, -64.0
    expected[0, 40] = 127 * (torch.tensor(3.0) / 127).half().float()
    assert torch.equal(blocks_of_32(x), expected)


def test_a_block_of_256_by_hand():
    x = torch.zeros(2, 256)
    x[0, 7], x[0, 8], x[0, 9] = -254.0, 254.0, 1.0
    # The first of the greatest decides: scale 127/254, codes 127·(-1)·…; 1 → 0.5 → 0 (ties to even).
    found = blocks_of_256(x)
    assert found[0, :10].tolist() == [0, 0, 0, 0, 0, 0, 0, -254.0, 254.0, 0]
    assert torch.equal(found[1], torch.zeros(256))


@pytest.mark.parametrize("function", [blocks_of_32, blocks_of_256])
def test_shape_dtype_and_error_bound(function):
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0))
    found = function(x)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert function(x.bfloat16()).dtype == torch.bfloat16
    block = 32 if function is blocks_of_32 else 256
    most = x.reshape(2, 3, -1, block).abs().amax(-1, keepdim=True).expand(2, 3, -1, block).reshape(x.shape)
    assert ((found - x).abs() <= most / 127 * 0.5 + most * 5e-4).all()


def test_ids_that_are_looked_up_stay():
    ids = torch.arange(10)
    for kind in ("f16", "bf16", "q8_0"):
        assert TARGET.activation(Gguf(kind))(ids) is ids


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load(ModelSpec(id=str(tiny_model_dir("llama")), dtype="float32"))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "bf16"])
def test_llama_cpp_rounds_so(kind, model, tmp_path):
    """One layer in a type with blocks: what llama.cpp computes is nearer with the rounding than without."""
    layer, scheme = "lm_head", Gguf(kind)
    weight = plugins.load("methods", "gguf", Method).quantize(model.weight(layer) * 30, scheme)
    write(model, {layer: weight}, tmp_path / "model.gguf")
    with Engine(tmp_path / "model.gguf", threads=1, context=32) as engine:
        found = torch.from_numpy(engine.logits(TOKENS)).log_softmax(-1)

    def apart(activations):
        model.swap({layer: weight.dequantize()}, activations)
        with torch.inference_mode():
            ours = model.outputs(torch.tensor([TOKENS]))[0].log_softmax(-1)
        model.restore()
        return float(F.kl_div(found, ours, reduction="batchmean", log_target=True))

    rounded = apart({layer: TARGET.activation(scheme)})
    assert rounded < 2e-5
    assert rounded < 0.5 * apart(None)
