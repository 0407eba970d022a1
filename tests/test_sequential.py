"""Quantization in sequence, against the plain way to say it: the whole model run anew for every layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.bank import digest
from autoq.errors import BadInput
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.methods._weights import IntegerWeight
from autoq.scheme import Keep, parse_scheme
from autoq.sequential import DAMPING, sequenced
from autoq.spec import build_spec

FAMILIES = ("llama", "gemma2", "phi", "opt", "gpt2", "mixtral", "bert", "t5")


@pytest.fixture
def evaluator_of(trained_models, trained_model_dir, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path_factory.getbasetemp() / "sequential-cache"))
    text = tmp_path_factory.getbasetemp() / "sequential.txt"
    text.write_text(trained_models.documentation())

    def make(family, dtype="float32", tokens=512, target="generic"):
        return Evaluator(
            build_spec(
                {
                    "model": {"id": str(trained_model_dir(family)), "dtype": dtype},
                    "data": {
                        "source": str(text),
                        **{f"{part}_tokens": tokens for part in ("calibration", "search", "report")},
                        "window_tokens": 64,
                    },
                    "target": {"name": target},
                    "workers": {"cpus": 1},
                }
            )
        )

    return make


def uniform(evaluator, text, kinds=("linear", "conv1d")):
    scheme = parse_scheme(text)
    return Assignment({x.name: scheme if x.kind in kinds else Keep() for x in evaluator.info.layers})


def read_by(model, name, data):
    """What a layer reads (tokens, in), by the model as it is now."""
    rows = []
    handle = model.modules_of(model.info.layer(name))[0].register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        for window in data:
            model.outputs(window[None])
    handle.remove()
    return torch.cat(rows).double()


def aimed(weight, wanted, x):
    """The weight that gives on `x` (tokens, in) what `weight` gives on `wanted`, by damped least squares, as far on the
    way there as each half of the tokens says of the change that the other half told."""
    if torch.equal(x, wanted):
        return weight
    off, middle = (wanted - x) @ weight.double().t(), len(x) // 2

    def change(rows):
        square = x[rows].t() @ x[rows]
        square += DAMPING * square.diagonal().mean() * torch.eye(len(square))
        return torch.linalg.solve(square, x[rows].t() @ off[rows]).t()

    halves = slice(middle), slice(middle, None)
    given = torch.cat([x[rows] @ change(other).t() for rows, other in zip(halves, reversed(halves), strict=True)])
    share = float((given * off).sum() / given.square().sum())
    return (weight.double() + min(max(share, 0), 1) * change(slice(None))).float()


def one_by_one(evaluator, assignment, made):
    """Layer -> weight, each from a run of the whole model with all layers that run before it as they were `made`.

    One code that comes out otherwise would change all that follows, so what follows is not built on what is found here.
    """
    model, data = evaluator.model, evaluator.parts.calibration
    order = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=layer.name: order.append(name))
        for layer in model.info.layers
        if not isinstance(assignment[layer.name], Keep)
        for module in model.modules_of(layer)
    ]
    with torch.no_grad():
        for window in data:
            model.outputs(window[None])
    for handle in handles:
        handle.remove()
    found, weights = {}, {}
    for name in dict.fromkeys(order):
        model.swap(weights)
        x = read_by(model, name, data)
        model.restore()
        weight = model.weight(name)
        if model.info.layer(name).stack is None:
            weight = aimed(weight, read_by(model, name, data), x)
        method = plugins.load("methods", assignment[name].method, Method)
        statistics = {
            "hessian": (x.t() @ x / len(x)).float(),
            "input_mean_square": x.square().mean(0).float(),
            "input_peak": x.abs().amax(0).float(),
        }
        found[name] = method.quantize(weight, assignment[name], statistics)
        weights[name] = made.get(name, found[name]).dequantize(model.weight(name).dtype)
    model.restore()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_made_of_what_it_reads_in_the_model_quantized_so_far(evaluator_of, family):
    evaluator = evaluator_of(family)
    assignment = uniform(evaluator, "gptq-int3-g32")
    window = evaluator.parts.search[:1]
    before = evaluator.model.outputs(window)
    told = []
    found = sequenced(evaluator, assignment, lambda *step: told.append(step))
    expected = one_by_one(evaluator, assignment, found.layers)
    # What reads nothing quantized comes out as it was.
    same = {name for name in expected if name not in found.layers}
    assert 0 < len(same) < len(expected) / 2
    assert {digest(evaluator.quantized(name, assignment[name])) for name in same} == {
        digest(expected[name]) for name in same
    }
    for name, made in found.layers.items():
        assert isinstance(made, IntegerWeight)
        # Sums that are added up in another order may decide a code, and what follows it in a row, otherwise.
        agree = (made.codes() == expected[name].codes()).float().mean()
        alone = (made.codes() == evaluator.quantized(name, assignment[name]).codes()).float().mean()
        assert agree > max(0.98, alone), (name, agree, alone)
        assert made.nbytes == evaluator.info.layer(name).nbytes(assignment[name])
    assert told == [(done, told[-1][1]) for done in range(told[-1][1] + 1)]
    assert told[-1][1] == (1 if family == "t5" else 2)
    again = sequenced(evaluator, assignment).layers
    assert {name: digest(made) for name, made in again.items()} == {name: digest(m) for name, m in found.layers.items()}
    # The model is as it was.
    assert torch.equal(evaluator.model.outputs(window), before)


METHODS = [
    "awq-int3-g32",
    "clip-int3-g32",
    "wkmeans3-channel",
    "wanda50-int4-g32",
    "rtn-int3-g32",
    "hqq-int3-g32",
    "nf4-g32",
]


@pytest.mark.parametrize("text", METHODS)
def test_every_method_is_made_so(evaluator_of, text):
    evaluator = evaluator_of("llama")
    assignment = uniform(evaluator, text)
    found = sequenced(evaluator, assignment).layers
    expected = one_by_one(evaluator, assignment, found)
    assert len(found) > len(expected) / 2
    for name, made in found.items():
        off = (made.dequantize() - expected[name].dequantize()).norm()
        alone = (made.dequantize() - evaluator.quantized(name, assignment[name]).dequantize()).norm()
        assert off < 0.5 * alone or off < 1e-3 * made.dequantize().norm(), (name, off, alone)


def test_scales_and_rounding_of_inputs_are_those_of_the_weight_that_was_made(evaluator_of):
    """smooth's scales are others than those that it found alone, and its kernel rounds over them."""
    evaluator = evaluator_of("llama", "bfloat16", target="torch-cpu")
    assignment = uniform(evaluator, "smooth-int8-channel-sym-a8dyn")
    found = sequenced(evaluator, assignment).layers
    name, made = next(
        (n, m)
        for n, m in found.items()
        if not torch.equal(m.input_scales(), evaluator.quantized(n, assignment[n]).input_scales())
    )
    x = torch.randn(1, 7, made.shape[1])
    rounded = evaluator.activation(name, assignment[name], made)(x)
    plain = evaluator.target.activation(assignment[name])
    torch.testing.assert_close(rounded, plain(x / made.input_scales()) * made.input_scales())
    assert not torch.equal(rounded, evaluator.activation(name, assignment[name])(x))


def test_outputs_of_layers_are_nearer_to_those_of_the_unquantized_model(evaluator_of):
    """Of each layer in its place, what was made in sequence and what was made alone, on the same inputs."""
    evaluator = evaluator_of("llama")
    assignment, data = uniform(evaluator, "gptq-int2-g32"), evaluator.parts.calibration
    found = sequenced(evaluator, assignment).layers
    ratios = []
    for name, made in found.items():
        evaluator.model.swap({other: layer.dequantize() for other, layer in found.items()})
        x = read_by(evaluator.model, name, data)
        evaluator.model.restore()
        wanted = read_by(evaluator.model, name, data) @ evaluator.model.weight(name).double().t()
        off, alone = (
            (wanted - x @ each.dequantize().double().t()).square().mean()
            for each in (made, evaluator.quantized(name, assignment[name]))
        )
        ratios.append(float(off / alone))
    # GPTQ finds small errors, not the least: a single layer may be worse.
    assert np.median(ratios) < 1, ratios
    assert np.exp(np.log(ratios).mean()) < 0.99, ratios


def test_what_was_trained_or_is_tied_or_reads_nothing_quantized_stays(evaluator_of):
    evaluator = evaluator_of("qwen2")  # its head is its embedding
    names = [layer.name for layer in evaluator.info.layers if layer.kind == "linear"]
    schemes = {layer.name: Keep() for layer in evaluator.info.layers} | {
        names[0]: parse_scheme("rtn-int3-g32"),
        names[1]: parse_scheme("gptq-int3-g32"),
        names[-1]: parse_scheme("gptq-int3-g32"),
    }
    head = next(layer.name for layer in evaluator.info.layers if layer.kind == "head")
    schemes[head] = parse_scheme("gptq-int3-g32")
    # The first two read an embedding that is quantized, as the head is.
    assert set(sequenced(evaluator, Assignment(schemes)).layers) == {*names[:2], names[-1]}
    schemes[head] = Keep()
    assert set(sequenced(evaluator, Assignment(schemes)).layers) == {names[-1]}
    import autoq.trained
    from autoq.bank import pack

    stored = evaluator.quantized(names[-1], schemes[names[-1]])
    trained = Assignment(schemes, {names[-1]: digest(stored)})
    autoq.trained.place(trained, lambda wanted: {each: pack(stored) for each in wanted})
    with pytest.raises(BadInput, match="read what they read in the unquantized model"):
        sequenced(evaluator, trained)
    with pytest.raises(BadInput, match=r"^no layer of the assignment is quantized"):
        sequenced(evaluator, Assignment(dict.fromkeys(schemes, Keep())))
