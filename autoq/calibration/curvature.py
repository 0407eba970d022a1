"""The curvature proxy: what a perturbed layer costs, from a few backward passes.

For labels drawn from the model itself, the Hessian of the KL divergence at the unquantized weights is
the Fisher matrix. Its block for one layer y = W x, under the Kronecker approximation (K-FAC, Martens &
Grosse 2015) with a diagonal output factor, gives for a perturbation ΔW

    KL per token ≈ ½ Σ_i E[g_i²] (ΔW E[x xᵀ] ΔWᵀ)_ii

with x the layer's input (in,) and g the gradient of the sequence's summed loss with respect to the
layer's output (out,), both averaged over token positions. The same second-order form underlies
OBQ/GPTQ (inputs only) and HAWQ-V2 (traces only); keeping both factors is what ranks whole assignments.

    E[g²]     `grad_square`   (out,)
    E[x xᵀ]   `input_square`  (in, in), or `inputs` (tokens, in) where that is smaller
    ΔW        original minus dequantized weight, (out, in)

Activation quantization with step s perturbs x by noise of variance s²/12, which adds
½ Σ_i E[g_i²] Σ_j W_ij² s²/12. For an embedding, a row v is read with frequency f_v, so the cost is
½ Σ_v f_v Σ_j E[g_j²] ΔW_vj²; a tied weight pays as head and as embedding.

An encoder without a head has no labels: there g is the gradient of Σ v·h/|h| with Gaussian v, and the
proxy is that of half the squared change of its normalized hidden states.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoq.errors import AutoQError, NotFinite
from autoq.layer import Layer
from autoq.models.loaded import LoadedModel


@dataclass
class _Statistics:
    """Running sums of one module."""

    positions: int = 0
    grad_square: Tensor | None = None  # (out,) sum over positions
    input_square: Tensor | None = None  # (in, in) sum over positions
    inputs: list[Tensor] | None = None  # [(tokens, in)], where that is smaller than (in, in)
    row_counts: Tensor | None = None  # (rows,) how often an embedding row was read
    step_square: float = 0.0  # sum over passes of the squared 8-bit step of the whole input
    low: float = 0.0  # the least input
    high: float = 0.0
    passes: int = 0


class _Gatherer:
    """Hooks that add up the statistics of every layer while the model runs forward and backward."""

    def __init__(self, model: LoadedModel, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.by_module: dict[nn.Module, _Statistics] = {}
        # q, k and v read one tensor: its second moment is computed once per pass and shared.
        self._shared: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for layer in self.model.info.layers:
            for module in self.model.modules_of(layer):
                self.by_module.setdefault(module, _Statistics())
                handles.append(module.register_forward_hook(self._on_forward(module)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(self, module: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            own = self.by_module[module]
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(lambda grad: self._on_gradient(own, grad))  # type: ignore[no-untyped-call]
            if isinstance(module, nn.Embedding):
                self._count_rows(own, inputs[0], module.num_embeddings)
            else:
                self._add_inputs(own, inputs[0].detach())

        return hook

    def _on_gradient(self, own: _Statistics, grad: Tensor) -> None:
        # Not in place: a float32 gradient would go on squared.
        square = grad.detach().reshape(-1, grad.shape[-1]).float().square().sum(0)
        own.positions += grad.numel() // grad.shape[-1]
        own.grad_square = square if own.grad_square is None else own.grad_square + square

    def _count_rows(self, own: _Statistics, ids: Tensor, rows: int) -> None:
        counts = torch.bincount(ids.reshape(-1), minlength=rows).float()
        own.row_counts = counts if own.row_counts is None else own.row_counts + counts

    def _add_inputs(self, own: _Statistics, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        own.step_square += float((high.clamp(min=0) - low.clamp(max=0)) / 255) ** 2
        own.low, own.high = min(own.low, float(low)), max(own.high, float(high))
        own.passes += 1
        if self._shared is not None and self._shared[0] is x:
            moment = self._shared[1]
        else:
            flat = x.reshape(-1, x.shape[-1])
            moment = flat if self.tokens < x.shape[-1] else flat.float().t() @ flat.float()
            self._shared = (x, moment)
        if self.tokens < x.shape[-1]:
            own.inputs = [*(own.inputs or []), moment]
        elif own.input_square is None:
            own.input_square = moment.clone()
        else:
            own.input_square += moment


def _loss(model: LoadedModel, window: Tensor, generator: torch.Generator) -> Tensor:
    """A sequence's summed loss, whose output gradients have the Fisher matrix as covariance."""
    output = model.outputs(window).float()
    flat = output.reshape(-1, output.shape[-1])
    if not torch.isfinite(flat).all():
        raise NotFinite("the unquantized model's outputs on the calibration data are NaN or infinite")
    if model.info.task == "encoder":
        directions = torch.randn(flat.shape, generator=generator).to(flat.device)
        return (F.normalize(flat, dim=-1) * directions).sum()
    with torch.no_grad():
        labels = torch.multinomial(flat.softmax(-1).cpu(), 1, generator=generator).squeeze(-1).to(flat.device)
    return F.cross_entropy(flat, labels, reduction="sum")


def gather(
    model: LoadedModel, windows: Tensor, seed: int, progress: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Tensor]]:
    """Statistics of every layer from one forward and one backward pass over `windows` (n, tokens).

    Returns layer name -> tensors: `grad_square`, `input_square` or `inputs`, `step_square`, `input_range`
    (least and greatest input, widened to hold 0), and for a layer that is read as an embedding
    `row_frequency` and `row_grad_square`. All but ranges are averages over token positions, float32.
    Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    gatherer = _Gatherer(model, windows.numel())
    with gatherer.watching(), torch.enable_grad():
        for window in windows:
            loss = _loss(model, window.unsqueeze(0).to(model.device), generator)
            loss.backward()  # type: ignore[no-untyped-call]
            progress()
    return {layer.name: _averages(model, layer, gatherer.by_module) for layer in model.info.layers}


def _averages(model: LoadedModel, layer: Layer, by_module: dict[nn.Module, _Statistics]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for module in model.modules_of(layer):
        own = by_module[module]
        if own.passes:
            result["input_range"] = torch.tensor([own.low, own.high])
        if own.grad_square is None:  # nothing depends on this module's output, or the model did not run it
            continue
        mean_square = (own.grad_square / own.positions).cpu()
        if isinstance(module, nn.Embedding):
            assert own.row_counts is not None
            result["row_frequency"] = (own.row_counts / own.positions).cpu()
            result["row_grad_square"] = mean_square
            continue
        result["grad_square"] = mean_square
        result["step_square"] = torch.tensor([own.step_square / max(own.passes, 1)])
        if own.inputs is not None:
            result["inputs"] = torch.cat(own.inputs).cpu()
        elif own.input_square is not None:
            result["input_square"] = (own.input_square / own.positions).cpu()
    return result


def proxy(statistics: dict[str, Tensor], weight: Tensor, dequantized: Tensor, dynamic_activation: bool) -> float:
    """Predicted KL in nats per token of replacing `weight` (out, in) by `dequantized`, this layer alone.

    `dynamic_activation` adds the noise of 8-bit input quantization.
    """
    original = weight.float()
    delta = dequantized.float() - original
    cost = 0.0
    if "row_frequency" in statistics:
        per_row = delta.square() @ statistics["row_grad_square"].float()
        cost += 0.5 * float(per_row @ statistics["row_frequency"].float())
    if "grad_square" in statistics:
        grad_square = statistics["grad_square"].float()
        if "input_square" in statistics:
            spread = ((delta @ statistics["input_square"].float()) * delta).sum(1)
        else:
            spread = (statistics["inputs"].float() @ delta.t()).square().mean(0)
        if dynamic_activation:
            spread = spread + original.square().sum(1) * statistics["step_square"].float() / 12
        cost += 0.5 * float(grad_square @ spread)
    return cost


def save(statistics: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Write statistics to one safetensors file, atomically. Raises `AutoQError` where it cannot be written."""
    flat = {f"{layer}/{name}": t.contiguous() for layer, own in statistics.items() for name, t in own.items()}
    beside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as problem:
        with suppress(OSError):
            beside.unlink()
        raise AutoQError(
            f"the statistics cannot be written to {str(path.parent)!r}: {problem}; set AUTOQ_CACHE to another folder"
        ) from problem


def is_whole(path: Path) -> bool:
    """Whether `path` is a file of statistics with all of its bytes: a crash of the machine may leave less."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def bound(folder: Path, limit_bytes: int) -> None:
    """Remove files of statistics, those used longest ago first, until they take at most `limit_bytes`.

    The newest stays whatever its size. Whoever has a removed file mapped keeps its content.
    """
    files = []
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # removed by another worker meanwhile
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files)[:-1]:
        if total <= limit_bytes:
            return
        with suppress(OSError):
            path.unlink()
        total -= size


def load(path: Path, layer: str) -> dict[str, Tensor]:
    """The statistics of one layer from a file that `save` wrote; memory-mapped."""
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.rpartition("/")[0] == layer]  # noqa: SIM118 - not a dict
        return {key.rpartition("/")[2]: file.get_tensor(key) for key in keys}
