"""Where scales of a layer's inputs can go: the outputs, made before, that keep a scale until the layer reads them.

W x = (W diag(s)) (x / s). If x is y ⊙ g for a norm's weight g, then x / s is y ⊙ (g / s); if x is made of rows of
another layer's outputs by what commutes with scaling each of them, those rows may be over s. Which outputs reach which
inputs in this way is seen, not guessed: a few tokens run through the model, and every output of a norm or layer carries
labels, the numbers of its channels. What torch computes of them decides about the labels:

    views, selections, casts, copies          move the labels as they move the numbers
    products with what has none, ReLU         keep them (ReLU(x / s) = ReLU(x) / s for s > 0)
    attention and matrix products, as values  keep them: a mean over positions, channel by channel
    anything else                             ends them, and that channel cannot be scaled

A layer whose inputs all carry labels of one module has that module as its `Source`. A channel's labels end wherever
anything but a layer reads it in any other way: a residual sum, a norm, a nonlinearity, the model's output. So a
source's layers are all that read its outputs. A norm is known by what it does to random numbers, not by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoq.layer import Layer, Source

Kind = Literal["gain", "gain_plus_one", "rows"]

_MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "__getitem__",
        "split",
        "chunk",
        "unbind",
        "expand",
        "expand_as",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "narrow",
        "swapaxes",
        "movedim",
        "tensor_split",
        "view_as",
        "reshape_as",
        "index_select",
        "repeat_interleave",
    ]
)
_COPIES = frozenset(
    [
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "contiguous",
        "clone",
        "detach",
        "dropout",
        "relu",
        "relu_",
        "neg",
    ]
)
_PRODUCTS = frozenset(["mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"])
_QUOTIENTS = frozenset(["div", "__truediv__", "true_divide", "div_", "__itruediv__"])
_TOLD = frozenset(
    [
        "size",
        "dim",
        "stride",
        "numel",
        "__len__",
        "is_contiguous",
        "element_size",
        "is_floating_point",
        "__get__",
        "get_device",
    ]
)
_LEAST = 1e-5  # relative: what float32 rounds away of a norm's outputs


class _Labels:
    """The labels of one tensor: which `module` made its channels, and their numbers in a tensor of its shape."""

    def __init__(self, tensor: Tensor, module: str, numbers: Tensor) -> None:
        self.tensor = tensor  # kept, so that no other tensor gets its identity
        self.module, self.numbers = module, numbers


class Tracer(TorchFunctionMode):
    """Follows channels from norms and layers to layers, while a model runs once within `following`."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], norms: Mapping[str, Kind]) -> None:
        super().__init__()
        self._model, self._layers, self._norms = model, layers, norms
        self._labels: dict[int, _Labels] = {}
        self._ended: dict[str, Tensor] = {}  # module -> which of its channels cannot be scaled
        self._read: dict[str, list[tuple[str, Tensor]]] = {}  # layer -> module and channels (in,) of each call
        self._inside = 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hooks on all modules that make or read channels, and this mode."""
        with ExitStack() as stack:
            for name in self._norms:
                handle = self._model.get_submodule(name).register_forward_hook(self._on_made(name))
                stack.callback(handle.remove)
            for name, module in self._layers.items():
                reads, made = self._on_read(name), self._on_made(name)
                stack.callback(module.register_forward_pre_hook(reads).remove)
                stack.callback(module.register_forward_hook(self._leaves(module, made)).remove)
            with self:
                yield

    def sources(self, layers: list[Layer], outputs: Any) -> dict[str, Source]:
        """Layer -> source, of a run whose result was `outputs`. Experts that did not run are as those that did."""
        for tensor in _tensors(outputs):
            self._end(tensor)
        known = {layer.name: layer for layer in layers}
        for name, calls in self._read.items():
            # A weight that others hold too, and a module that is no layer, cannot take scales.
            if name not in known or known[name].tied or len(calls) != 1:
                for module, numbers in calls:
                    self._ended[module][numbers] = True
        found: dict[str, Source] = {}
        for name, calls in self._read.items():
            if name not in known or len(calls) != 1:
                continue
            module, numbers = calls[0]
            if not self._ended[module][numbers].any():
                kind = self._norms.get(module, "rows")
                if kind != "rows" or (module in known and not known[module].tied and known[module].kind != "router"):
                    found[name] = Source(module, kind, _runs(numbers))
        return _for_all_experts(found, layers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._inside:
            labelled = [each for each in _tensors((args, kwargs)) if id(each) in self._labels]
            if labelled:
                self._follow(func, args, kwargs or {}, made, labelled)
        return made

    def _on_read(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._inside += 1
            own = self._labels.get(id(inputs[0])) if inputs else None
            if own is None:
                self._read.setdefault(name, [])
                return
            rows = own.numbers.reshape(-1, own.numbers.shape[-1])
            if len(rows) and torch.equal(rows, rows[:1].expand_as(rows)):
                self._read.setdefault(name, []).append((own.module, rows[0].clone()))
            else:
                self._end(inputs[0])

        return hook

    def _leaves(self, module: nn.Module, made: Callable[..., None]) -> Callable[..., None]:
        def hook(*call: Any) -> None:
            self._inside -= 1
            if not isinstance(module, nn.Embedding):
                made(*call)

        return hook

    def _on_made(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, outputs: Any) -> None:
            if self._inside or not isinstance(outputs, Tensor):
                return
            count = outputs.shape[-1]
            again = name in self._ended  # of a module that runs twice, two tensors would need one scale
            self._ended.setdefault(name, torch.zeros(count, dtype=torch.bool))
            self._ended[name] |= again
            numbers = torch.arange(count).expand(outputs.shape)
            self._labels[id(outputs)] = _Labels(outputs, name, numbers)

        return hook

    def _end(self, tensor: Tensor) -> None:
        if (own := self._labels.get(id(tensor))) is not None:
            self._ended[own.module][own.numbers.reshape(-1)] = True

    def _follow(self, func: Any, args: Any, kwargs: Any, made: Any, labelled: list[Tensor]) -> None:
        name = getattr(func, "__name__", "")
        if name in _TOLD and not list(_tensors(made)):
            return
        numbers = None
        value = _value(name, args, kwargs)
        if value is not None and sum(each is value for each in labelled) == 1:
            for each in labelled:  # queries and keys, say
                if each is not value:
                    self._end(each)
            labelled = [value]
        own = self._labels[id(labelled[0])]
        if all(each is labelled[0] for each in labelled):
            try:
                numbers = self._moved(name, func, args, kwargs, made, own)
            except (RuntimeError, TypeError, ValueError, IndexError):  # a use of the function that is not thought of
                numbers = None
        if numbers is None:
            for each in labelled:
                self._end(each)
            return
        for tensor, label in zip(_tensors(made), numbers, strict=True):
            self._labels[id(tensor)] = _Labels(tensor, own.module, label)

    def _moved(self, name: str, func: Any, args: Any, kwargs: Any, made: Any, own: _Labels) -> list[Tensor] | None:
        """The numbers of what was `made` of the labelled tensor, one for each tensor; None where they end."""
        first = bool(args) and args[0] is own.tensor
        if name in _COPIES and first and isinstance(made, Tensor):
            return [own.numbers] if made.shape == own.numbers.shape else None
        if name in _MOVES and first:
            return list(_tensors(func(own.numbers, *args[1:], **kwargs)))
        operands = [each for each in args[:2] if isinstance(each, Tensor | int | float)]
        if name in _PRODUCTS or (name in _QUOTIENTS and first):
            twice = sum(each is own.tensor for each in operands) > 1
            return None if twice or len(operands) < 2 or kwargs else [own.numbers.expand(made.shape)]
        return _mixed(own.numbers, made) if _value(name, args, kwargs) is own.tensor else None


def _value(name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The operand whose rows the function adds up with weights that the others give, if it is such a function."""
    if name == "scaled_dot_product_attention":
        found: Tensor | None = args[2] if len(args) > 2 else kwargs.get("value")
        return found
    if name in ("matmul", "__matmul__", "bmm") and len(args) == 2:
        return args[1] if isinstance(args[1], Tensor) else None
    return None


def _mixed(values: Tensor, made: Tensor) -> list[Tensor] | None:
    """Numbers of sums over positions of values (…, positions, channels), whose heads may be fewer than those made."""
    one = values[..., :1, :]
    if not torch.equal(values, one.expand_as(values)):
        return None
    if one.dim() == made.dim() == 4 and one.shape[1] != made.shape[1]:
        one = one.repeat_interleave(made.shape[1] // one.shape[1], dim=1)
    return [one.expand(made.shape)]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _runs(numbers: Tensor) -> tuple[tuple[int, int], ...]:
    """`numbers` as runs (first, count) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for number in numbers.tolist():
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)


def channels(source: Source) -> Tensor:
    """The channel of the source that each input is, (in,) int64: the inverse of a source's runs."""
    return torch.cat([torch.arange(first, first + count) for first, count in source.channels])


def _for_all_experts(found: dict[str, Source], layers: list[Layer]) -> dict[str, Source]:
    """What is known of one expert's matrix holds for those of the block's other experts."""
    of_stack: dict[str, tuple[str, Source]] = {}
    for layer in layers:
        if layer.stack is not None and layer.name in found:
            of_stack.setdefault(layer.stack, (layer.name.rpartition(".")[0], found[layer.name]))
    for layer in layers:
        if layer.stack in of_stack:
            expert, source = of_stack[layer.stack]
            own, module = layer.name.rpartition(".")[0], source.module
            inner = module.startswith(f"{expert}.")
            module = own + module.removeprefix(expert) if inner else module
            found[layer.name] = Source(module, source.kind, source.channels)
    return found


def find_norms(model: nn.Module) -> dict[str, Kind]:
    """Name -> kind of the modules that do nothing behind multiplying by their weight and adding their bias."""
    known: dict[tuple[Any, ...], Kind | None] = {}
    found: dict[str, Kind] = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if (
            weight is None
            or weight.dim() != 1
            or not parameters.keys() <= {"weight", "bias"}
            or list(module.children())
        ):
            continue
        key = (type(module), len(weight), "bias" in parameters)
        if key not in known:
            known[key] = _kind(module, len(weight))
        if (kind := known[key]) is not None:
            found[name] = kind
    return found


@torch.no_grad()
def _kind(module: nn.Module, width: int) -> Kind | None:
    """What the norm makes of its weight, by random numbers: of which weight its outputs are those over scales."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, scales = (torch.randn(count, width, generator=generator) for count in (3, 1, 1, 1))
    scales = scales.exp()[0]
    try:
        mine = copy.deepcopy(module)

        def outputs(gain: Tensor, shift: Tensor) -> Tensor:
            for name, value in (("weight", gain), ("bias", shift)):
                if mine._parameters.get(name) is not None:
                    setattr(mine, name, nn.Parameter(value.clone(), requires_grad=False))
            made = mine(x.clone())
            assert isinstance(made, Tensor)
            return made.float()

        expected = outputs(weight[0], bias[0]) / scales
        kinds: dict[Kind, Tensor] = {"gain": weight[0] / scales, "gain_plus_one": (1 + weight[0]) / scales - 1}
        for kind, gain in kinds.items():
            off = (outputs(gain, bias[0] / scales) - expected).abs().max()
            if expected.abs().max() > 0 and off <= _LEAST * expected.abs().max():
                return kind
    except Exception:  # whatever a module says to an input that was not meant for it: it is no norm
        return None
    return None
