"""The curvature proxy: what a perturbed layer costs, from a few backward passes.

For labels drawn from the model itself, the Hessian of the KL divergence at the unquantized weights is
the Fisher matrix. For one layer y = W x and a perturbation ΔW it gives

    KL per token ≈ ½ E[⟨G, ΔW⟩²] / T        G = Σ_t g_t x_tᵀ

with x_t the input (in,) and g_t the gradient of the sequence's summed loss with respect to the output
(out,) at position t, G (out, in) that with respect to the weight, T the sequence's tokens, and E the mean
over sequences and labels. As E[vec G vec Gᵀ] has (out · in)² entries, it is taken as a Kronecker product of

    E[G Gᵀ]   (out, out), of which the diagonal is kept
    E[Gᵀ G]   (in, in)

over the trace of either. These are Shampoo's factors (Gupta et al. 2018), and close to the best such product
(Morwani et al. 2024). K-FAC (Martens & Grosse 2015) has E[g gᵀ] and E[x xᵀ] instead, as if gradients and inputs
were independent, and so were positions. Neither is so in a transformer. An attention sink has huge inputs,
and next to nothing depends on its outputs. And an error that is alike at all positions adds up where
attention takes means over them: `v_proj` of SmolLM2 costs three times what its positions cost one by one.

    KL per token ≈ ½ Σ_i A_i (ΔW H ΔWᵀ)_ii

    A    `output_square`      (out,)  diagonal of E[G Gᵀ] / T
    H    `input_square`       (in, in) E[Gᵀ G] over its trace, or `inputs` (k, in) where that is smaller: rows
                              whose mean square is H
    ΔW   original minus dequantized weight, (out, in)

Activation quantization with step Δ perturbs x by noise of variance Δ²/12, which positions do not share: it
adds ½ Σ_i E[g_i²] Σ_j W_ij² E[|g|² Δ²] / (12 E[|g|²]), with `grad_square` E[g²] (out,). An embedding's input is
one-hot, so E[G Gᵀ] is diagonal for rows that are read and the cost is ½ Σ_v f_v Σ_j A_j ΔW_vj² with f the rows'
share of the trace; a tied weight pays as head and as embedding.

    E[x²]  `input_mean_square`  (in,), not weighted: for methods that weigh a layer's inputs

An encoder without a head has no labels: there the loss is Σ v·h/|h| with Gaussian v, and the proxy is that of
half the squared change of its normalized hidden states.
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

    Returns layer name -> tensors: `output_square`, `input_square` or `inputs`, `grad_square`, `step_square`,
    `input_range` (least and greatest input, widened to hold 0), `input_mean_square`, and for a layer that is
    read as an embedding `row_frequency` and `row_output_square`. What is squared is a sum over all positions by
    the number of tokens, so a module that runs twice pays twice; H, steps and rows are shares of such sums,
    `input_mean_square` is a plain mean. Float32. Each window is a sequence of its own. Deterministic for a seed.
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
        if own.output_square is None:  # nothing depends on this module's output, or the model did not run it
            continue
        output_square = (own.output_square / gatherer.tokens).cpu()
        # All zeros where the loss does not move, and then so are the sums that it divides.
        trace = _divisor(own.output_square)
        if own.row_square is not None:
            result["row_frequency"] = own.row_square / trace.cpu()
            result["row_output_square"] = output_square
            continue
        assert own.grad_square is not None
        assert own.step_square is not None
        result["output_square"] = output_square
        result["grad_square"] = (own.grad_square / gatherer.tokens).cpu()
        result["step_square"] = (own.step_square / _divisor(own.grad_square)).reshape(1).cpu()
        if own.input_square is not None:
            result["input_square"] = (own.input_square / trace).cpu()
        else:
            rows = torch.cat(own.inputs)
            result["inputs"] = (rows / trace.sqrt() * len(rows) ** 0.5).cpu()
    return result


def _divisor(sums: Tensor) -> Tensor:
    return sums.sum().clamp(min=torch.finfo(torch.float32).tiny)


def proxy(statistics: dict[str, Tensor], weight: Tensor, dequantized: Tensor, dynamic_activation: bool) -> float:
    """Predicted KL in nats per token of replacing `weight` (out, in) by `dequantized`, this layer alone.

    `dynamic_activation` adds the noise of 8-bit input quantization.
    """
    original = weight.float()
    delta = dequantized.float() - original
    cost = 0.0
    if "row_frequency" in statistics:
        per_row = delta.square() @ statistics["row_output_square"].float()
        cost += 0.5 * float(per_row @ statistics["row_frequency"].float())
    if "output_square" in statistics:
        if "input_square" in statistics:
            spread = ((delta @ statistics["input_square"].float()) * delta).sum(1)
        else:
            spread = (statistics["inputs"].float() @ delta.t()).square().mean(0)
        cost += 0.5 * float(statistics["output_square"].float() @ spread)
        if dynamic_activation:
            noise = original.square().sum(1) * statistics["step_square"].float() / 12
            cost += 0.5 * float(statistics["grad_square"].float() @ noise)
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
