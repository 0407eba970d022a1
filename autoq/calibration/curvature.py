"""The curvature proxy: what a perturbed layer costs, from a few backward passes.

For labels drawn from the model itself, the Hessian of the KL divergence at the unquantized weights is
the Fisher matrix. For one layer y = W x, and without what different outputs and positions share, a
perturbation ΔW costs

    KL per token ≈ ½ E[Σ_i g_i² (ΔW x)_i²]

with x the input (in,) and g the gradient of the sequence's summed loss with respect to the output (out,)
at one position t, and E the mean over positions. As that would need a second moment per output, g_ti² is
taken as E[g_i²] s_t / E[s] with the saliency s_t = |g_t|²: its sums over positions and over outputs are
right.

    KL per token ≈ ½ Σ_i E[g_i²] (ΔW H ΔWᵀ)_ii        H = Σ_t s_t x_t x_tᵀ / Σ_t s_t

K-FAC (Martens & Grosse 2015) has H = E[x xᵀ], as if gradients and inputs were independent. In a
transformer they are not: an attention sink has huge inputs, and next to nothing depends on its outputs.
GuidedQuant (Kim et al. 2025) weighs the inputs likewise, per group of outputs, and has no E[g_i²].
OBQ/GPTQ use the same second-order form (inputs only), and HAWQ-V2 (traces only).

    E[g²]     `grad_square`        (out,)
    H         `input_square`       (in, in), or `inputs` (tokens, in) where that is smaller: rows
                                   x_t √(s_t / E[s]), so their mean square is H
    ΔW        original minus dequantized weight, (out, in)
    E[x²]     `input_mean_square`  (in,), not weighted: for methods that weigh a layer's inputs

Activation quantization with step Δ perturbs x by noise of variance Δ²/12, which adds
½ Σ_i E[g_i²] Σ_j W_ij² E[s Δ²]/(12 E[s]). An embedding's input is one-hot, which makes H diagonal: row v
is read with frequency f_v, weighted as above, and the cost is ½ Σ_v f_v Σ_j E[g_j²] ΔW_vj²; a tied weight
pays as head and as embedding.

An encoder without a head has no labels: there g is the gradient of Σ v·h/|h| with Gaussian v, and the
proxy is that of half the squared change of its normalized hidden states.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoq.calibration._hooks import Gatherer
from autoq.errors import AutoQError, NotFinite
from autoq.layer import Layer
from autoq.models.loaded import LoadedModel


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
    (least and greatest input, widened to hold 0), `input_mean_square`, and for a layer that is read as an
    embedding `row_frequency` and `row_grad_square`. Squared gradients are sums over all positions by the
    number of tokens, so a module that runs twice pays twice; inputs, steps and rows are averages that the
    saliency weighs, `input_mean_square` a plain one. Float32, but `inputs` may be bfloat16. Deterministic
    for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    gatherer = Gatherer(model, windows.numel())
    with gatherer.watching(), torch.enable_grad():
        for window in windows:
            # Not named: it would hold this pass's inputs, which the hooks refer to, during the next one.
            _loss(model, window.unsqueeze(0).to(model.device), generator).backward()  # type: ignore[no-untyped-call]
            progress()
    return {layer.name: _averages(model, layer, gatherer) for layer in model.info.layers}


def _averages(model: LoadedModel, layer: Layer, gatherer: Gatherer) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for module in model.modules_of(layer):
        own = gatherer.by_module[module]
        if own.plain_square is not None:
            result["input_range"] = torch.tensor([own.low, own.high])
            result["input_mean_square"] = (own.plain_square / own.positions).cpu()
        if own.grad_square is None:  # nothing depends on this module's output, or the model did not run it
            continue
        mean_square = (own.grad_square / gatherer.tokens).cpu()
        # All zeros where the loss does not move, and then so are the sums that it divides.
        saliency = own.grad_square.sum().clamp(min=torch.finfo(torch.float32).tiny)
        if own.row_saliency is not None:
            result["row_frequency"] = own.row_saliency / saliency.cpu()
            result["row_grad_square"] = mean_square
            continue
        assert own.step_square is not None
        result["grad_square"] = mean_square
        result["step_square"] = (own.step_square / saliency).reshape(1).cpu()
        if own.input_square is not None:
            result["input_square"] = (own.input_square / saliency).cpu()
        else:
            result["inputs"] = _weighted_rows(own.inputs, saliency).cpu()
    return result


def _weighted_rows(inputs: list[tuple[Tensor, Tensor]], total: Tensor) -> Tensor:
    """Rows (positions, in) whose mean square is the inputs' second moment, weighted by their saliency."""
    x = torch.cat([x for x, _ in inputs])
    share = torch.cat([saliency for _, saliency in inputs]) / total
    # A rare large row would not fit into float16.
    return (x * (share * len(x)).sqrt().unsqueeze(1)).to(torch.promote_types(x.dtype, torch.bfloat16))


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
