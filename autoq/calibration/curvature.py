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

Gradients of large layers are not formed: both factors come from random projections (`autoq.calibration._gradients`).
Of the calibration's tokens the first `GRADIENT_TOKENS` go backward. On SmolLM2, half of 4,096 tokens instead of all
moves a layer's predicted loss by 8 % (standard deviation), and another drawing of the labels by 10 %.

Activation quantization perturbs x by noise, which positions do not share: it adds ½ Σ_i E[g_i²] Σ_j W_ij² ν, with
`grad_square` E[g²] (out,) and ν the noise's mean square, each position weighted by its |g|². With integers over a
range that is found while running, of step Δ, ν = E[|g|² Δ²] / (12 E[|g|²]); Δ is that of a sequence's whole range or
of a token's largest magnitude. A calibrated rounding Q is the same at all positions, so there ν is

    Σ_b S_b (Q(c_b) - c_b)² / Σ_b S_b     S `input_saliency`, the sum of |g|² over the inputs in bin b of a histogram
                                          whose middle is c_b; what is cut off is included

and floats, whose error is a share of the number and hardly depends on the range, are taken for calibrated ones. An
embedding's input is one-hot, so E[G Gᵀ] is diagonal for rows that are read and the cost is ½ Σ_v f_v Σ_j A_j ΔW_vj²
with f the rows' share of the trace; a tied weight pays as head and as embedding.

Methods that quantize with an eye to a layer's inputs get these, not weighted by gradients, of all positions:

    E[x²]     `input_mean_square`  (in,)
    E[x xᵀ]   `hessian`            (in, in) or `input_rows` (k, in), the inputs as they were, where these are fewer
                                   numbers; neither for a layer of too many (`MOST_HESSIAN_INPUTS`)
    max |x|   `input_peak`         (in,)

A classification model has one label a sequence, so T = 1 and the proxy is that of KL per sequence; its labels are
drawn from its own classes.

An encoder without a head has no labels: there the loss is Σ v·h/|h| with Gaussian v, and the proxy is that of
half the squared change of its normalized hidden states.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoq.calibration import unseen
from autoq.calibration._hooks import Gatherer, Sums, mean_moments
from autoq.calibration.histogram import Histogram
from autoq.errors import AutoQError, NotFinite
from autoq.layer import Layer, Task
from autoq.models.loaded import LoadedModel
from autoq.scheme import Float, Integer

GRADIENT_TOKENS = 2048  # of the calibration's tokens these also go backward: another drawing of labels changes more

Statistics = Mapping[str, Tensor]  # of one layer

_TINY = torch.finfo(torch.float32).tiny
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def go_back(output: Tensor, task: Task, generator: torch.Generator) -> None:
    """Go backward from a sequence's `output` (1, t, v) with a gradient that has the Fisher matrix as covariance.

    That of the cross-entropy with drawn labels, p minus one-hot, is not computed by way of its value.
    """
    if task == "encoder":
        flat = output.float().reshape(-1, output.shape[-1])
        directions = torch.randn(flat.shape, generator=generator).to(flat.device)
        (F.normalize(flat, dim=-1) * directions).sum().backward()  # type: ignore[no-untyped-call]
        return
    probabilities = output.detach().reshape(-1, output.shape[-1]).softmax(-1).cpu()
    labels, others = _draw(probabilities, torch.rand(len(probabilities), 1, generator=generator))
    rows = torch.arange(len(probabilities))
    probabilities[rows, labels[:, 0]] = -others[:, 0].to(probabilities.dtype)  # `scatter_` walks over all of them
    output.backward(probabilities.to(output.device).view_as(output))  # type: ignore[no-untyped-call]


def _draw(probabilities: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (t, 1) drawn from `probabilities` (t, v) by `uniform` numbers (t, 1), and what all others add up to.

    First a run of neighbouring labels is found by what each run adds up to, then the label in it: the distribution
    is the same, and no running sum over the vocabulary is written out. 1 less the label's probability would be lost
    in a short float where that is near 1.
    """
    classes = probabilities.shape[1]
    run = math.isqrt(classes)
    runs = classes // run  # the last one has those that are left over, too
    sums = probabilities[:, : runs * run].reshape(-1, runs, run).sum(-1, dtype=torch.float32)
    sums[:, -1] += probabilities[:, runs * run :].sum(-1, dtype=torch.float32)
    upto = sums.cumsum(-1)
    target = uniform * upto[:, -1:]
    chosen = torch.searchsorted(upto, target, right=True).clamp_(max=runs - 1)
    before = upto.gather(1, chosen) - sums.gather(1, chosen)
    longest = classes - (runs - 1) * run
    places = chosen * run + torch.arange(longest)
    inside = torch.where(chosen < runs - 1, run, longest)
    own = probabilities.gather(1, places.clamp(max=classes - 1)).float()
    own.masked_fill_(torch.arange(longest) >= inside, 0.0)
    labels = chosen * run + torch.searchsorted(own.cumsum(-1), target - before, right=True).clamp_(max=inside - 1)
    # What rounding let fall behind the run's last label that can be drawn.
    empty = probabilities.gather(1, labels) == 0
    labels = torch.where(empty, chosen * run + own.argmax(1, keepdim=True), labels)
    return labels, upto[:, -1:] - probabilities.gather(1, labels).float()


def gather(
    model: LoadedModel, windows: Tensor, seed: int, progress: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Tensor]]:
    """Statistics of every layer from a forward pass over `windows` (n, tokens) and a backward one over the first.

    Returns layer name -> tensors: `output_square`, `input_square` or `inputs`, `grad_square`, `step_square`,
    `token_step_square`, `input_range` (least and greatest input, widened to hold 0), `input_mean_square`, `hessian`
    or `input_rows`, `input_peak`, `input_counts` and `input_saliency` (histograms of the inputs whose bins
    `input_exponent` tells; `autoq.calibration.histogram`), and for a layer that is read as an embedding
    `row_frequency` and `row_output_square`. What is squared is a sum over all positions by the number of outputs, so
    a module that runs twice pays twice; H, steps and rows are shares of such sums, `input_mean_square` and `hessian`
    are plain means. Float32 but for `input_rows`, which are the model's own numbers, and counts (int64). Layers that
    read the same input one after the other share one tensor. An expert's are of the tokens that it saw; for one that
    saw none see `autoq.calibration.unseen`. Each window is a sequence of its own. Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    length = model.length(windows)
    gatherer = Gatherer(model, model.tokens(windows))
    # The experts of a mixture see a part of the tokens each: there all of them count.
    mixture = any(layer.stack is not None for layer in model.info.layers)
    backward = len(windows) if mixture else min(len(windows), max(1, GRADIENT_TOKENS // length))
    with gatherer.watching():
        for index, window in enumerate(windows):
            with gatherer.passing(backward=index < backward):
                output = model.outputs(window.unsqueeze(0).to(model.device))
                if not torch.stack(torch.aminmax(output.detach())).isfinite().all():  # NaN wins over every number
                    raise NotFinite("the unquantized model's outputs on the calibration data are NaN or infinite")
                if index < backward:
                    go_back(output, model.info.task, generator)
            progress()
    shared: dict[tuple[int, ...], dict[str, Tensor]] = {}
    outputs = backward * model.positions(length)
    found = {layer.name: _averages(model, layer, gatherer, outputs, shared) for layer in model.info.layers}
    seen = {
        layer.name: sum(gatherer.by_module[m].positions for m in model.modules_of(layer)) for layer in model.info.layers
    }
    unseen.fill(model.info, found, seen)
    return found


def of_inputs(model: LoadedModel, names: Sequence[str], tokens: int, run: Callable[[], None]) -> dict[str, Statistics]:
    """Statistics of what the layers `names` read while `run` runs the model, forward only, over `tokens` tokens in all.

    As `gather` gives them, but for those that are made of gradients. A layer that did not run is left out.
    """
    gatherer = Gatherer(model, tokens)
    with gatherer.reading(names):
        run()
    shared: dict[tuple[int, ...], dict[str, Tensor]] = {}
    found = {name: _averages(model, model.info.layer(name), gatherer, 1, shared) for name in names}
    return {name: own for name, own in found.items() if own}


def _averages(
    model: LoadedModel,
    layer: Layer,
    gatherer: Gatherer,
    outputs: int,
    shared: dict[tuple[int, ...], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The statistics of one layer by the number of `outputs`.

    `shared` remembers the second moments of inputs that several layers read.
    """
    result: dict[str, Tensor] = {}
    for module in model.modules_of(layer):
        own = gatherer.by_module[module]
        if own.low is not None:
            assert own.high is not None
            result["input_range"] = torch.stack([own.low.min(), own.high.max()]).cpu()
            result["input_peak"] = torch.maximum(-own.low, own.high).cpu()
            key = (*map(id, own.moments), *map(id, own.read))
            if key not in shared:
                shared[key] = _second_moments(own)
            result |= shared[key]
            plain = result["hessian"].diagonal() if own.plain_square is None else own.plain_square / own.positions
            result["input_mean_square"] = plain.cpu().clone()
            result["input_counts"] = own.counts.sums
            result["input_exponent"] = torch.tensor([own.counts.exponent])
        if own.output_square is None:  # nothing depends on this module's output, or the model did not run it
            continue
        output_square = (own.output_square / outputs).cpu()
        # All zeros where the loss does not move, and then so are the sums that it divides.
        trace = _divisor(own.output_square)
        if own.row_square is not None:
            result["row_frequency"] = own.row_square / trace.cpu()
            result["row_output_square"] = output_square
            continue
        assert own.grad_square is not None
        assert own.step_square is not None
        result["output_square"] = output_square
        result["grad_square"] = (own.grad_square / outputs).cpu()
        assert own.token_step_square is not None
        result["token_step_square"] = (own.token_step_square / _divisor(own.grad_square)).reshape(1).cpu()
        result["step_square"] = (own.step_square / _divisor(own.grad_square)).reshape(1).cpu()
        own.saliency.widen(own.counts.exponent)
        result["input_saliency"] = own.saliency.sums.float()
        result |= _input_square(own)
    return result


def _input_square(own: Sums) -> dict[str, Tensor]:
    """H, or the rows whose mean square it is where they are fewer numbers."""
    rows = torch.cat(own.inputs) if own.inputs else None
    if own.input_square is not None:
        square = own.input_square if rows is None else own.input_square + rows.t() @ rows
        return {"input_square": (square / square.trace().clamp(min=_TINY)).cpu()}
    assert rows is not None
    return {"inputs": (rows / rows.square().sum().clamp(min=_TINY).sqrt() * len(rows) ** 0.5).cpu()}


def _second_moments(own: Sums) -> dict[str, Tensor]:
    if own.moments:
        return {"hessian": mean_moments(own).cpu()}
    return {"input_rows": torch.cat(own.read).cpu()} if own.read else {}


def _divisor(sums: Tensor) -> Tensor:
    return sums.sum().clamp(min=_TINY)


def proxy(statistics: Statistics, weight: Tensor, dequantized: Tensor, input_noise: float = 0.0) -> float:
    """Predicted KL in nats per token of replacing `weight` (out, in) by `dequantized`, this layer alone.

    `input_noise` is the mean square of what quantization does to an input: see `dynamic_noise`, `static_noise`.
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
        if input_noise:
            noise = original.square().sum(1) * input_noise
            cost += 0.5 * float(statistics["grad_square"].float() @ noise)
    return cost


def dynamic_noise(statistics: Statistics, scheme: Integer | Float, per_token: bool) -> float:
    """Mean square, weighted by |g|², of 8-bit rounding over a range that is found while running.

    `per_token`: of each token's inputs, and otherwise of all of a sequence's. 0 for a layer that no loss depends on.
    """
    if isinstance(scheme, Float):
        scale = float(statistics["input_range"].abs().max()) / _E4M3_MAX if "input_range" in statistics else 0.0
        return static_noise(statistics, lambda x: (x / scale).to(torch.float8_e4m3fn).float() * scale) if scale else 0.0
    name = "token_step_square" if per_token else "step_square"
    return float(statistics[name]) / 12 if name in statistics else 0.0


def static_noise(statistics: Statistics, rounded: Callable[[Tensor], Tensor]) -> float:
    """Mean square, weighted by |g|², of what `rounded` does to inputs, which it must treat one by one.

    0 for a layer that no loss depends on.
    """
    if "input_saliency" not in statistics:
        return 0.0
    weights = statistics["input_saliency"].double()
    filled = weights > 0
    inputs = Histogram(weights, int(statistics["input_exponent"])).centres[filled].float()
    squares = (rounded(inputs).double() - inputs.double()).square()
    return float(weights[filled] @ squares / weights.sum().clamp(min=_TINY))


def save(statistics: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Write statistics to one safetensors file, atomically. Raises `AutoQError` where it cannot be written.

    A tensor that several layers share is written once; for the others the file's metadata names its place.
    """
    flat: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    elsewhere: dict[str, str] = {}
    for layer, own in statistics.items():
        for name, tensor in own.items():
            place = first.setdefault(id(tensor), f"{layer}/{name}")
            if place == f"{layer}/{name}":
                flat[place] = tensor.contiguous()
            else:
                elsewhere[f"{layer}/{name}"] = place
    beside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, beside, elsewhere)
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
        places = {key: key for key in file.keys()} | (file.metadata() or {})  # noqa: SIM118 - not a dict
        return {
            key.rpartition("/")[2]: file.get_tensor(place)
            for key, place in places.items()
            if key.rpartition("/")[0] == layer
        }
