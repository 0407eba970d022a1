"""Experts of a mixture as modules of their own: every matrix a linear layer, and none of them a copy.

transformers keeps all experts of a block in 3-D parameters of one module, (experts, out, in) or transposed, and
runs them by a function that is looked up by name. `split` gives that module a child per expert with a linear for
each of its matrices, whose weight is a view of the 3-D parameter, and `NAME` is the function that runs them. So an
expert's matrix can be hooked, replaced by pointer and swapped for a packed kernel like any other layer: nothing is
stacked again for an assignment, and the weights that were loaded are never written to.

Everything that the module does between its matrices (gates, clamps, a norm after each expert) is asked of it by
the names that transformers' own functions ask for. Modules that hold experts in another way (Llama 4, DBRX,
JetMoE) do not say these names; they run as they are, and their experts count as bytes that are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "autoq"  # what a model's `experts_implementation` must be for its experts to be split
_ASKED = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


class Expert(nn.Module):
    """One expert: `gate_up_proj` or `up_proj`, and `down_proj`, each a linear."""

    first: str

    def __init__(self, matrices: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.first = next(iter(matrices))
        for name, matrix in matrices.items():
            self.add_module(name, matrix)


def split(model: nn.Module) -> None:
    """Give every expert of `model` its own linears, in place. A model without such experts stays as it is."""
    for module in list(model.modules()):
        if _holds_experts(module):
            _split(module)


def stacks(model: nn.Module) -> dict[str, str]:
    """Name of each linear of an expert -> name of the 3-D parameter that it is a slice of."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Expert):
            parent = name.rpartition(".")[0]
            found |= {f"{name}.{matrix}": f"{parent}.{matrix}" for matrix, _ in module.named_children()}
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether the module has 3-D parameters for its experts and says how they are used."""
    if not all(hasattr(module, name) for name in _ASKED):
        return False
    found = [module._parameters.get(name) for name in _names(module)]
    return all(parameter is not None and parameter.dim() == 3 for parameter in found)


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _split(module: Any) -> None:
    names = _names(module)
    whole = {name: module._parameters.pop(name).data for name in names}
    biases = {name: module._parameters.pop(f"{name}_bias").data if module.has_bias else None for name in names}
    for index in range(module.num_experts):
        matrices = {}
        for name in names:
            weight, bias = whole[name][index], biases[name]
            turned = weight.t() if module.is_transposed else weight
            matrices[name] = _linear(turned, None if bias is None else bias[index])
        module.add_module(str(index), Expert(matrices))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that holds these tensors (out, in) and (out,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def run(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts that a router chose for each token add up to, (tokens, width).

    `hidden_states` is (tokens, width), `top_k_index` and `top_k_weights` (tokens, k). An expert runs on the rows
    of its own tokens, in their order, and on none if there are none. Sums over k as transformers' grouped
    function adds them up.
    """
    tokens, k = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
    outputs = []
    of_experts: tuple[Tensor, ...] = torch.split(hidden_states[order // k], counts)
    for index, rows in enumerate(of_experts):
        if len(rows):
            expert = experts.get_submodule(str(index))
            inner = expert.get_submodule(expert.first)(rows)
            inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            outer = expert.down_proj(inner)
            outputs.append(experts.post_expert_norm(outer) if experts.has_post_expert_norm else outer)
    weighted = torch.cat(outputs)[order.argsort()] * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, run)
