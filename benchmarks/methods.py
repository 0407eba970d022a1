"""What each integer method makes of one model: loss, size, error of the layers, and time.

Every linear of the model under one scheme, the rest as it is. For each method and width:

  KL           to the unquantized model, nats per token, on text that nothing was calibrated on
  size         all that ships
  layer error  median over layers of tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), H = E[x xᵀ] of the calibration text
  quantize     wall and CPU seconds to quantize all linears, statistics at hand

`fixed` is symmetric and `hqq` has real zero points, as each defines it; the others have integer ones. Methods for
inputs in 8 bits are beside rtn with the same inputs, as `torch-cpu` rounds them.

    python benchmarks/methods.py [--model demo:smollm2] [--bits 3 4 8] [--group 64] [--methods rtn clip …]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
from _report import print_table
from torch import Tensor

from autoq import plugins
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.methods._inputs import second_moments
from autoq.scheme import Scheme, parse_scheme
from autoq.spec import build_spec
from autoq.statistics import mean_and_stderr

METHODS = ("rtn", "fixed", "clip", "lsq", "hqq", "awq", "gptq", "round")
ENDING = {"fixed": "-sym", "hqq": "-rz"}
DYNAMIC = "int8-channel-sym-a8dyn"


def schemes(options: argparse.Namespace) -> Iterator[Scheme]:
    for bits in options.bits:
        for method in options.methods:
            if method != "smooth":
                yield parse_scheme(f"{method}-int{bits}-g{options.group}{ENDING.get(method, '')}")
    if "smooth" in options.methods:
        yield from (parse_scheme(f"{method}-{DYNAMIC}") for method in ("rtn", "smooth"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "smooth"])
    parser.add_argument("--tokens", type=int, default=1024, help="of the report part")
    options = parser.parse_args()
    evaluator = Evaluator(
        build_spec(
            {
                "model": {"id": options.model},
                "data": {"report_tokens": options.tokens},
                "target": {"name": "torch-cpu"},
                "objectives": ["kl_nats_per_token"],
            }
        )
    )
    evaluator.calibrate()
    linears = [layer for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    reference = [answers(evaluator, window) for window in evaluator.parts.report]
    rows = []
    for scheme in schemes(options):
        method = plugins.load("methods", scheme.method, Method)
        weights, errors, wall, cpu = {}, [], 0.0, 0.0
        for layer in linears:
            weight, told = evaluator.model.weight(layer.name), evaluator.statistics(layer.name)
            began, worked = time.perf_counter(), time.process_time()
            quantized = method.quantize(weight, scheme, told)
            wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - worked
            weights[layer.name] = quantized.dequantize(weight.dtype)
            moments = second_moments(scheme, told, layer.in_features).float()
            errors.append(energy(quantized.dequantize() - weight.float(), moments) / energy(weight.float(), moments))
        functions = {layer.name: evaluator.activation(layer.name, scheme) for layer in linears}
        evaluator.model.swap(weights, {name: function for name, function in functions.items() if function})
        losses = torch.stack(
            [
                (expected.exp() * (expected - answers(evaluator, window))).sum(-1)
                for window, expected in zip(evaluator.parts.report, reference, strict=True)
            ]
        )
        evaluator.model.restore()
        mean, stderr, _ = mean_and_stderr(losses.double().numpy())
        size = evaluator.info.other_bytes + sum(
            layer.nbytes(scheme if layer in linears else parse_scheme("keep")) for layer in evaluator.info.layers
        )
        rows.append(
            [
                str(scheme),
                f"{mean:.4f} ± {stderr or 0:.4f}",
                f"{size / 1e6:.1f} MB",
                f"{statistics.median(errors):.2e}",
                f"{wall:.1f} s, {cpu:.1f} s",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    title = f"{len(linears)} linears of {options.model}, {evaluator.parts.report.numel()} tokens"
    print_table(title, ["scheme", "KL, nats/token", "size", "layer error", "quantize: wall, CPU"], rows)


@torch.inference_mode()
def answers(evaluator: Evaluator, window: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocabulary), float32."""
    return evaluator.model.outputs(window.unsqueeze(0))[0].float().log_softmax(-1)


def energy(weight: Tensor, moments: Tensor) -> float:
    """tr(W H Wᵀ)."""
    return float(((weight @ moments) * weight).sum())


if __name__ == "__main__":
    main()
