"""Experts: what their layers compute, what an assignment changes, and what calibration says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from autoq import plugins
from autoq.calibration import curvature
from autoq.errors import SpecError
from autoq.methods import Grid, Method
from autoq.methods.rtn import RoundToNearest as Rtn
from autoq.models import inspect, load
from autoq.models.experts import NAME, split, stacks
from autoq.models.inspection import architecture, read_config
from autoq.scheme import Keep, PerChannel, PerGroup, parse_scheme
from autoq.search.space import build_space
from autoq.spec import ModelSpec, SpaceSpec
from autoq.targets.generic import Generic
from autoq.targets.vllm import Vllm

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]
IDS = torch.arange(5, 85).view(2, 40)
EXPERT = "model.layers.0.mlp.experts.1.down_proj"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tiny_model_dir) -> Path:
    return tiny_model_dir(request.param)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def loaded(folder, cache):
    return load(ModelSpec(id=str(folder), dtype="float32"))


def original(folder: Path, implementation: str = "eager"):
    """transformers' own model, with its experts in 3-D parameters and its own function to run them."""
    spec = ModelSpec(id=str(folder), dtype="float32")
    model_class, _ = architecture(spec, read_config(spec, folder))
    return model_class.from_pretrained(folder, dtype=torch.float32, experts_implementation=implementation).eval()


_TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.mark.parametrize(
    ("name", "settings", "linears"),
    [
        ("Olmoe", {"num_experts": 4}, 16),
        ("Phimoe", {"num_local_experts": 4}, 16),
        ("GraniteMoe", {"num_local_experts": 4}, 16),
        ("DeepseekV2", _DEEPSEEK, 8),
        ("DeepseekV3", _DEEPSEEK, 8),
        ("Glm4Moe", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, 8),
        ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2}, 16),
        ("MiniMaxM2", {"num_local_experts": 4}, 16),
    ],
)
def test_other_families_compute_the_same_when_split(name, settings, linears):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_TINY, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, experts_implementation="eager").eval()
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_experts_implementation(NAME)
        split(model)
        assert len(stacks(model)) == linears
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def quantized(layer, weight):
    """Bits that differ from layer to layer, so that a mix-up of two experts shows."""
    number = sum(map(ord, layer.name))
    return Rtn().quantize(weight, parse_scheme(f"rtn-int{2 + number % 4}-channel"))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_outputs_are_those_of_transformers(folder, loaded, implementation):
    with torch.no_grad():
        expected = original(folder, implementation)(IDS, use_cache=False).logits
    torch.testing.assert_close(loaded.outputs(IDS).detach(), expected, rtol=1e-5, atol=1e-6)


def test_an_assignment_computes_what_a_model_with_its_weights_written_in_computes(folder, loaded):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    made = {layer.name: quantized(layer, loaded.weight(layer.name)) for layer in loaded.info.layers}
    naive = original(folder)
    with torch.no_grad():
        for layer in loaded.info.layers:
            values = made[layer.name].dequantize()
            if layer.stack is None:
                naive.get_submodule(layer.name).weight.copy_(values)
                continue
            whole = naive.get_parameter(layer.stack)[int(layer.name.split(".")[-2])]
            whole.copy_(values.t() if folder.name.startswith("gpt-oss") else values)
        expected = naive(IDS, use_cache=False).logits
        loaded.swap({name: weight.dequantize() for name, weight in made.items()})
        torch.testing.assert_close(loaded.outputs(IDS), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(loaded.outputs(IDS), original(folder)(IDS, use_cache=False).logits, atol=1e-3)
    loaded.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
    for layer in loaded.info.layers:
        assert made[layer.name].nbytes == layer.nbytes(made[layer.name].scheme)


def test_every_matrix_is_a_view_of_its_stack(folder):
    model = original(folder)
    state = dict(model.state_dict())
    split(model)
    parts = dict(model.state_dict())
    found = stacks(model)
    assert len(found) == sum(name.endswith("proj.weight") and ".experts." in name for name in parts)
    for name, stack in found.items():
        whole = state[stack][int(name.split(".")[-2])]
        assert torch.equal(parts[f"{name}.weight"], whole.t() if folder.name.startswith("gpt-oss") else whole)
        assert parts[f"{name}.weight"].data_ptr() == whole.data_ptr()
    assert sum(tensor.numel() for tensor in parts.values()) == sum(tensor.numel() for tensor in state.values())


def test_reach_is_the_share_of_tokens_that_an_expert_sees(loaded):
    config = loaded.model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    for layer in loaded.info.layers:
        assert layer.reach == (config.num_experts_per_tok / experts if layer.stack else 1.0)


def test_the_router_is_a_layer_of_its_own_kind(loaded):
    routers = [layer for layer in loaded.info.layers if layer.kind == "router"]
    assert [router.block for router in routers] == [0, 1]
    assert all(router.parameters == router.out_features * 32 for router in routers)


@pytest.fixture(scope="module")
def seen(loaded):
    """Layer -> the rows that it read and the gradients of its outputs, from a pass of three tokens."""
    rows, grads, handles = {}, {}, []
    for layer in loaded.info.layers:
        if layer.stack is None:
            continue

        def hook(_, inputs, output, name=layer.name):
            rows[name] = inputs[0].detach()
            output.register_hook(lambda grad: grads.update({name: grad.detach()}))

        handles.append(loaded.modules_of(layer)[0].register_forward_hook(hook))
    # After the hooks of the pass itself, whose gradients these are.
    found = curvature.gather(loaded, IDS[:1, :3], seed=0)
    for handle in handles:
        handle.remove()
    return found, rows, grads


@pytest.fixture(scope="module")
def info(folder):
    return inspect(ModelSpec(id=str(folder)))


class TestCalibration:
    """Statistics are of the tokens that an expert saw; one that saw none is like a token of the others."""

    def test_moments_are_of_the_tokens_that_came(self, loaded, seen):
        found, rows, grads = seen
        assert 0 < len(rows) < sum(layer.stack is not None for layer in loaded.info.layers)
        for name, x in rows.items():
            torch.testing.assert_close(found[name]["input_mean_square"], x.square().mean(0))
            whole = grads[name].t() @ x
            torch.testing.assert_close(found[name]["output_square"], whole.square().sum(1) / 3)

    def test_an_expert_that_saw_nothing_is_like_a_token_of_the_others(self, loaded, seen):
        found, rows, grads = seen
        unseen = [layer for layer in loaded.info.layers if layer.stack and layer.name not in rows]
        assert unseen
        for layer in unseen:
            others = [each.name for each in loaded.info.layers if each.stack == layer.stack and each.name in rows]
            x = torch.cat([rows[name] for name in others])
            own = found[layer.name]
            torch.testing.assert_close(own["input_mean_square"], x.square().mean(0))
            whole = {name: grads[name].t() @ rows[name] for name in others}
            square = sum(each.square().sum(1) for each in whole.values())
            torch.testing.assert_close(own["output_square"], square / 3 / len(x))
            torch.testing.assert_close(own["grad_square"], sum(grads[n].square().sum(0) for n in others) / 3 / len(x))
            if "hessian" in own:
                torch.testing.assert_close(own["hessian"], x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(own["input_rows"], x)
            torch.testing.assert_close(own["input_peak"], x.abs().amax(0))
            ranges = torch.stack([found[name]["input_range"] for name in others])
            assert own["input_range"].tolist() == [float(ranges[:, 0].min()), float(ranges[:, 1].max())]
            gram = sum(each.t() @ each for each in whole.values())
            h = own["input_square"] if "input_square" in own else own["inputs"].t() @ own["inputs"] / len(own["inputs"])
            torch.testing.assert_close(h, gram / gram.trace(), rtol=1e-4, atol=1e-7)

    def test_every_expert_is_predicted_to_lose_something_finite(self, loaded, seen):
        for layer in loaded.info.layers:
            if layer.stack:
                weight, own = loaded.weight(layer.name), seen[0][layer.name]
                dynamic = parse_scheme("rtn-int8-channel-sym-a8dyn")
                noises = [curvature.dynamic_noise(own, dynamic, per_token) for per_token in (False, True)]
                assert all(0 < noise < float("inf") for noise in noises)
                costs = [
                    curvature.proxy(own, weight, dequantized, noises[0])
                    for bits in (2, 4, 8)
                    for dequantized in [Rtn().quantize(weight, parse_scheme(f"rtn-int{bits}-channel")).dequantize()]
                ]
                assert costs == sorted(costs, reverse=True)
                assert 0 < costs[-1] < costs[0] < float("inf")

    @pytest.mark.parametrize("name", plugins.names("methods"))
    def test_methods_that_weigh_inputs_can_make_an_expert_that_saw_none(self, loaded, seen, name):
        found, rows, _ = seen
        layer = next(layer for layer in loaded.info.layers if layer.stack and layer.name not in rows)
        method = plugins.load("methods", name, Method)
        grid = Grid((name,), (4,), (PerChannel(), PerGroup(32)), ("integer", "none", "real"))
        for scheme in method.schemes(name, grid):
            if method.uses_statistics(scheme) and method.refuses(layer, scheme) is None:
                made = method.quantize(loaded.weight(layer.name), scheme, found[layer.name])
                assert made.dequantize().isfinite().all()
                assert made.nbytes == layer.nbytes(scheme)


class TestSpace:
    @staticmethod
    def space(info, target=None, **settings):
        settings = {"schemes": ("keep", "rtn-int4-channel"), **settings}
        return build_space(info, SpaceSpec(**settings), "any", target or Generic())

    def test_experts_of_a_block_are_one_decision_per_matrix(self, info):
        variables = {variable.name: variable for variable in self.space(info).variables}
        stacks = {layer.stack for layer in info.layers} - {None}
        assert stacks <= set(variables)
        assert len(stacks) == 4
        for stack in stacks:
            members = [layer for layer in info.layers if layer.stack == stack]
            assert list(variables[stack].members) == members

    def test_apart_each_has_its_own(self, info):
        names = {variable.name for variable in self.space(info, experts="apart").variables}
        assert {layer.name for layer in info.layers if layer.stack} <= names

    def test_the_router_is_searched_only_where_it_is_asked_for(self, info):
        routers = {layer.name for layer in info.layers if layer.kind == "router"}
        assert not routers & {variable.name for variable in self.space(info).variables}
        asked = self.space(info, kinds=("linear", "router"))
        assert routers <= {variable.name for variable in asked.variables}
        without = self.space(info, kinds=("linear", "router"), exclude=(sorted(routers)[0],))
        assert len(routers & {variable.name for variable in without.variables}) == 1

    def test_experts_are_excluded_and_overridden_by_name(self, info):
        space = self.space(
            info, exclude=(EXPERT,), overrides=({"match": "*.experts.0.down_proj", "schemes": ["keep"]},)
        )
        (variable,) = (v for v in space.variables if v.name == "model.layers.0.mlp.experts.down_proj")
        assert EXPERT not in {layer.name for layer in variable.members}
        assert [str(scheme) for scheme in variable.choices] == ["keep"]

    def test_a_target_that_runs_them_as_one_refuses_them_apart(self, info):
        with pytest.raises(SpecError, match=r"space\.experts: apart: any runs the experts of a block as one"):
            self.space(info, Vllm(), experts="apart")
        names = {variable.name for variable in self.space(info, Vllm(), schemes=("keep",)).variables}
        assert "model.layers.0.mlp.experts" in names


def test_a_model_without_experts_stays_as_it_is(tiny_model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    names = list(model.state_dict())
    split(model)
    assert list(model.state_dict()) == names
    assert stacks(model) == {}


def test_what_is_counted_adds_up_to_the_checkpoint(folder):
    info = inspect(ModelSpec(id=str(folder)))
    stored = sum((folder / name).stat().st_size for name in ["model.safetensors"])
    counted = sum(layer.nbytes(Keep()) for layer in info.layers) + info.other_bytes
    assert 0 < stored - counted < 20_000  # the file's header
    assert sum(layer.parameters for layer in info.layers if layer.stack) > 0.4 * sum(x.parameters for x in info.layers)
