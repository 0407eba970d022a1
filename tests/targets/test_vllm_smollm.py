"""SmolLM2 as a checkpoint for vLLM: bytes, differences and logits of a mixed assignment of real size."""

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.methods import Method
from autoq.models import load
from autoq.scheme import Keep, parse_scheme
from autoq.spec import ModelSpec
from autoq.targets import Target

TEXTS = ("rtn-int4-g64-sym", "rtn-int8-channel-sym-a8dyn", "hqq-int4-g64", "rtn-fp8-channel", "rtn-nvfp4-g16")


@pytest.mark.slow
def test_a_mixed_export_weighs_and_says_what_was_promised(tmp_path):
    target = plugins.load("targets", "vllm", Target)
    model = load(ModelSpec(id="demo:smollm2"))
    weights = {}
    groups: dict[str, str] = {}
    for layer in model.info.layers:
        scheme = parse_scheme(groups.setdefault(layer.fusion_group or layer.name, TEXTS[len(groups) % len(TEXTS)]))
        if target.refuses(layer, scheme) is not None:
            scheme = Keep()
        method = plugins.load("methods", scheme.method, Method)
        weights[layer.name] = method.quantize(model.weight(layer.name), scheme)
    exported = target.export(model, weights, tmp_path, lambda _: {})
    stored = sum((tmp_path / file).stat().st_size for file in exported.weights)
    promised = sum(weight.nbytes for weight in weights.values()) + model.info.other_bytes
    assert abs(stored / promised - 1) < 0.002
    text = "A mapping object maps hashable values to arbitrary objects. Mappings are mutable objects."
    tokens = torch.tensor(model.tokenizer(text)["input_ids"])
    quantized = {name: weight for name, weight in weights.items() if weight.scheme != Keep()}
    functions = {name: target.activation(weight.scheme) for name, weight in quantized.items()}
    model.swap(
        {name: weight.dequantize(torch.bfloat16) for name, weight in quantized.items()},
        {name: function for name, function in functions.items() if function is not None},
    )
    with torch.inference_mode():
        expected = model.outputs(tokens.unsqueeze(0))[0].float()
    with target.reload(tmp_path) as runtime:
        assert runtime.differences(Assignment({name: weight.scheme for name, weight in weights.items()})) == []
        assert torch.equal(runtime.outputs(tokens), expected)
