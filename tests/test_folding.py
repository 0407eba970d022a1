"""Folded scales of inputs: whole models with them in norms and in rows of layers, against the models as they were."""

from __future__ import annotations

import copy

import pytest
import torch

from autoq import folding
from autoq.assignment import Assignment
from autoq.errors import SchemeRefused
from autoq.evaluation import Evaluator
from autoq.folded_model import folded
from autoq.methods._search import nearest, plain_grid
from autoq.methods._weights import FOLDED, IntegerWeight
from autoq.models.folding import channels
from autoq.scheme import Keep, parse_scheme
from autoq.search.space import build_space
from autoq.spec import SpaceSpec, TargetSpec, build_spec
from autoq.targets import load_target

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "opt", "gpt2", "gpt-neox", "mixtral", "bart")


@pytest.fixture
def evaluator_of(trained_models, trained_model_dir, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path_factory.getbasetemp() / "folding-cache"))
    text = tmp_path_factory.getbasetemp() / "folding.txt"
    text.write_text(trained_models.documentation())

    def make(family, dtype="float32", target="generic"):
        parts = {f"{part}_tokens": 256 for part in ("calibration", "search", "report")}
        spec = {
            "model": {"id": str(trained_model_dir(family)), "dtype": dtype},
            "data": {"source": str(text), **parts, "window_tokens": 64},
            "target": {"name": target},
            "workers": {"cpus": 1},
        }
        return Evaluator(build_spec(spec))

    return make


def foldable(evaluator, scheme):
    from autoq import plugins
    from autoq.methods import Method

    method = plugins.load("methods", scheme.method, Method)
    return [layer for layer in evaluator.info.layers if method.refuses(layer, scheme) is None]


def outputs(evaluator):
    with torch.no_grad():
        return evaluator.model.outputs(evaluator.parts.search[:1])


def scaled(evaluator, scheme, names):
    """Layers under `scheme` with scales drawn at random, one for each output of what they are folded into."""
    generator, drawn, made = torch.Generator().manual_seed(1), {}, {}
    for name in names:
        layer, weight = evaluator.info.layer(name), evaluator.model.weight(name).float()
        place = channels(layer.source)
        if layer.source.module not in drawn:
            drawn[layer.source.module] = torch.exp2(-torch.randint(0, 5, (4 * 64 * 4,), generator=generator).float())
        own = drawn[layer.source.module][place]
        made[name] = nearest(weight * own, scheme, *plain_grid(weight * own, scheme), own)
    return made


def both(evaluator, made, plain=None):
    """The outputs of the model with dequantized weights swapped in, and of the folded one on what ships of them."""
    weights = {**(plain or {}), **made}
    before, original = outputs_with(evaluator, weights), outputs(evaluator)
    with folded(evaluator.model, weights) as shipped:
        assert not any(FOLDED in weight.tensors for weight in shipped.values())
        for name, weight in shipped.items():
            assert sum(t.nbytes for t in weight.tensors.values()) == evaluator.info.layer(name).nbytes(weight.scheme)
            assert weight.nbytes == weights[name].nbytes
        after = outputs_with(evaluator, shipped)
    assert torch.equal(outputs(evaluator), original), "the model is not as it was"
    assert not torch.equal(before, original)
    return before, after


def outputs_with(evaluator, weights):
    model = evaluator.model
    model.swap({name: weight.dequantize(model.weight(name).dtype) for name, weight in weights.items()})
    found = outputs(evaluator)
    model.restore()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_computes_what_it_did(evaluator_of, family):
    evaluator = evaluator_of(family)
    scheme = parse_scheme("awq-int3-g32-fold")
    own = foldable(evaluator, scheme)
    kinds = {layer.source.kind for layer in own}
    assert kinds == ({"rows"} if family == "bart" else {"rows", "gain_plus_one" if "gemma" in family else "gain"})
    before, after = both(evaluator, scaled(evaluator, scheme, [layer.name for layer in own]))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "gemma2"])
def test_in_bfloat16_it_is_the_same_bit_for_bit_but_for_one_plus_w(evaluator_of, family):
    evaluator = evaluator_of(family, "bfloat16")
    scheme = parse_scheme("awq-int4-g32-fold")
    before, after = both(evaluator, scaled(evaluator, scheme, [layer.name for layer in foldable(evaluator, scheme)]))
    if family == "gemma2":
        assert (after - before).abs().max() < 0.05 * before.abs().max()
    else:
        assert torch.equal(before, after)


def test_rounded_inputs_are_those_of_the_folded_model(evaluator_of):
    evaluator = evaluator_of("llama", "bfloat16", "vllm")
    scheme = parse_scheme("smooth-int8-channel-sym-a8dyn-fold")
    own = [layer for layer in foldable(evaluator, scheme) if layer.kind == "linear"]
    assignment = Assignment({x.name: scheme if x in own else Keep() for x in evaluator.info.layers})
    weights = evaluator.layers(assignment)
    assert sum(weight.tensors[FOLDED].unique().numel() > 1 for weight in weights.values()) > len(own) / 4
    with evaluator.swapped(assignment):
        before = outputs(evaluator)
    with folded(evaluator.model, weights) as shipped:
        rounded = evaluator.target.activation(scheme)
        state = {name: weight.dequantize(torch.bfloat16) for name, weight in shipped.items()}
        evaluator.model.swap(state, dict.fromkeys(state, rounded))
        after = outputs(evaluator)
        evaluator.model.restore()
    assert torch.equal(before, after)


def test_layers_that_are_kept_are_compensated(evaluator_of):
    """k is kept, which reads what q and v read; v and up are kept, which o's and down's scales go into."""
    evaluator = evaluator_of("llama")
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qv"]
    names += ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    made = scaled(evaluator, parse_scheme("awq-int3-g32-fold"), names)
    plain = {x.name: evaluator.quantized(x.name, Keep()) for x in evaluator.info.layers}  # as exports get them
    for others in ({}, plain):
        before, after = both(evaluator, made, others)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    with folded(evaluator.model, {**plain, **made}) as shipped:
        key = "model.layers.0.self_attn.k_proj"
        scales = made[names[0]].input_scales()
        assert torch.equal(shipped[key].tensors["weight"], plain[key].tensors["weight"] * scales)


def test_a_router_and_experts_that_are_kept_are_compensated(evaluator_of):
    """No scheme of a space scales what a router reads; the fold itself knows how."""
    evaluator = evaluator_of("mixtral")
    made = scaled(evaluator, parse_scheme("awq-int8-g32-fold"), ["model.layers.0.mlp.experts.0.gate_up_proj"])
    (weight,) = made.values()
    before, after = both(evaluator, made)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    others = ("gate", "experts.1.gate_up_proj", "experts.3.gate_up_proj")
    plain = {name: evaluator.model.weight(f"model.layers.0.mlp.{name}").clone() for name in others}
    with folded(evaluator.model, made):
        for name in others:
            assert torch.equal(
                evaluator.model.weight(f"model.layers.0.mlp.{name}"), plain[name] * weight.input_scales()
            )


@pytest.mark.parametrize(
    "text", ["rtn-int4-g32", "hqq-int3-g32-rz", "nf4-g32", "kmeans3-channel", "rtn-fp8-channel", "rtn-int8-channel-sym"]
)
def test_rows_of_every_scheme_with_a_scale_for_each_can_be_over_others(evaluator_of, text):
    evaluator = evaluator_of("llama")
    blocks = [f"model.layers.{block}.self_attn" for block in (0, 1)]
    made = scaled(evaluator, parse_scheme("awq-int3-g32-fold"), [f"{block}.o_proj" for block in blocks])
    plain = {f"{block}.v_proj": evaluator.quantized(f"{block}.v_proj", parse_scheme(text)) for block in blocks}
    before, after = both(evaluator, made, plain)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_layers_that_share_scales_find_the_same_and_heads_share_theirs(evaluator_of):
    evaluator = evaluator_of("llama")
    # Inputs that differ more than those of so small a model, and heads that do.
    for name, exponents in (("model.layers.0.input_layernorm", 64), ("model.layers.0.self_attn.v_proj", 32)):
        weight = evaluator.model.model.get_submodule(name).weight
        scales = torch.exp2(torch.arange(exponents).remainder(7).float() - 3).view(-1, *[1] * (weight.dim() - 1))
        weight.data = weight.data * scales
    scheme = parse_scheme("awq-int3-g32-fold")
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    made = {name: evaluator.quantized(name, scheme) for name in names}
    assert all(isinstance(weight, IntegerWeight) for weight in made.values())
    assert len({tuple(made[name].input_scales().tolist()) for name in names[:3]}) == 1
    for name in names:
        scales = made[name].input_scales()
        assert scales.unique().numel() > 2
        assert torch.equal(scales, scales.log2().round().exp2())
    heads = scales.view(2, 2, 16)  # two heads of queries read one of values
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])
    # By the weights together it is no worse than plain rounding, and the bank knows all of them.
    moments = evaluator.statistics(names[0])["hessian"]
    error = {"fold": 0.0, "plain": 0.0}
    for name in names[:3]:
        weight, plain = evaluator.model.weight(name), evaluator.quantized(name, parse_scheme("rtn-int3-g32"))
        for kind, each in (("fold", made[name]), ("plain", plain)):
            off = each.dequantize() - weight
            error[kind] += float(((off @ moments) * off).sum())
    assert error["fold"] < error["plain"]
    hits = evaluator.bank.hits
    evaluator.quantized(names[1], scheme)
    assert evaluator.bank.hits == hits + 1
    key = evaluator._together_key(names[1])
    evaluator._hashes[names[2]] = "other"
    assert evaluator._together_key(names[1]) != key


def spaced(info, **space):
    return build_space(info, SpaceSpec(**space), "vllm", load_target(TargetSpec(name="vllm")))


def test_a_space_for_vllm_folds_and_refuses_what_cannot_be(evaluator_of):
    info = evaluator_of("llama", "bfloat16").info
    space = spaced(info, methods=["awq"], bits=[4], group_size=[32], zero_points=["integer"])
    assert {str(scheme) for own in space.choices.values() for scheme in own} == {"awq-int4-g32-fold"}
    sizes = {layer.name: layer.nbytes(parse_scheme("rtn-int4-g32")) for layer in info.layers}
    assert all(layer.nbytes(parse_scheme("awq-int4-g32-fold")) == sizes[layer.name] for layer in info.layers)
    kept = spaced(info, methods=["awq"], bits=[4], group_size=[32], exclude=["*.k_proj"])
    assert all("k_proj" not in name for name in kept.choices)
    with pytest.raises(
        SchemeRefused,
        match=r"^space: model\.layers\.0\.self_attn\.o_proj as awq-int4-g32-fold: its scales would be folded into "
        r"model\.layers\.0\.self_attn\.v_proj, and as rtn-int8-tensor-sym-a8dyn rows share a scale per tensor; leave",
    ):
        spaced(
            info,
            schemes=["awq-int4-g32-fold"],
            overrides=[{"match": f"*.{x}_proj", "schemes": ["rtn-int8-tensor-sym-a8dyn"]} for x in "qkv"],
        )
    with pytest.raises(SchemeRefused, match=r"fold them: awq-int4-g32-sym-fold"):
        spaced(info, schemes=["awq-int4-g32-sym"])
    with pytest.raises(SchemeRefused, match=r"nothing makes the layer's inputs that can be scaled"):
        spaced(evaluator_of("phi", "bfloat16").info, schemes=["awq-int4-g32-fold"])


def test_layers_that_read_one_norm_are_one_decision_where_they_fold(evaluator_of):
    info = evaluator_of("phi").info  # attention and MLP read the same norm
    target = load_target(TargetSpec(name="generic"))
    space = build_space(
        info, SpaceSpec(schemes=["awq-int4-g32-fold", "rtn-int4-g32"], exclude=["*.fc2"]), "generic", target
    )
    together = next(v for v in space.variables if v.name == "inputs from model.layers.0.input_layernorm")
    assert [layer.name.rpartition(".")[2] for layer in together.members] == ["q_proj", "k_proj", "v_proj", "fc1"]
    plain = build_space(info, SpaceSpec(schemes=["rtn-int4-g32"]), "generic", target)
    assert all(len(variable.members) == 1 for variable in plain.variables)


def test_assignments_that_cannot_be_folded_are_refused_by_name(evaluator_of):
    info = evaluator_of("llama").info
    keep = {layer.name: Keep() for layer in info.layers}
    q, k, v = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    fold = parse_scheme("awq-int4-g32-fold")
    assert folding.conflict(info.layers, {**keep, q: fold}) is None
    assert folding.conflict(info.layers, keep) is None
    told = folding.conflict(info.layers, {**keep, q: fold, k: parse_scheme("rtn-int4-g32")})
    assert told == f"{q} as {fold} and {k} as rtn-int4-g32 read the same inputs, and must share the scales of these"
    tied = copy.copy(info.layers)
    tied = tuple(
        layer if layer.name != v else type(layer)(**{**vars(layer), "tied": ("model.embed_tokens",)}) for layer in tied
    )
    assert "whose weight is an embedding's" in folding.conflict(tied, {**keep, q: fold})
    assert folding.rows_refuse(parse_scheme("gguf-q4_0")) == "it has no scale for each row"
    assert folding.rows_refuse(parse_scheme("rtn-nvfp4-g16")) == "its scales are 8-bit floats"
    assert folding.rows_refuse(parse_scheme("rtn-fp8-b128x128")) == "rows share a scale per block"


def test_the_text_of_a_folded_scheme_and_what_has_none():
    for text in ("awq-int4-g64-fold", "smooth-int8-channel-sym-a8dyn-fold"):
        scheme = parse_scheme(text)
        assert str(scheme) == text
        assert scheme.scales_inputs and not scheme.ships_input_scales
    from autoq.errors import BadInput

    with pytest.raises(BadInput, match="rtn has no scales of inputs to fold; awq, smooth have"):
        parse_scheme("rtn-int4-g64-fold")
