"""What calibration costs beside a bare forward pass over the same tokens, and what methods make of it.

In CPU seconds, side by side in one run, several rounds in turn:

  bare        a forward pass of the unquantized model over the calibration part, no gradients
  gradients   the same and backward passes from drawn labels where the curvature has them, nothing gathered
  statistics  all statistics of all layers (`curvature.gather`): ranges, histograms, second moments, curvature

and, once, every linear made by methods that use them, with the number of calibration passes that it took.

    python benchmarks/calibration_cost.py [--model demo:smollm2] [--tokens 4096] [--rounds 3] [--schemes gptq-int4-g64]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _report import print_table

from autoq.bank import Bank
from autoq.calibration import curvature
from autoq.quantized_model import QuantizedModel
from autoq.scheme import parse_scheme
from autoq.spec import build_spec

SCHEMES = ("gptq-int4-g64", "gptq-int3-g64", "clip-int4-g64")


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    options = parser.parse_args()
    spec = build_spec(
        {
            "model": {"id": options.model},
            "data": {"calibration_tokens": options.tokens},
            "target": {"name": "generic"},
            "workers": {"cpus": options.threads},
        }
    )
    worker = QuantizedModel(spec)
    data = worker.parts.calibration

    def bare() -> None:
        with torch.inference_mode():
            for window in data:
                worker.model.outputs(window.unsqueeze(0))

    def gradients() -> None:
        generator = torch.Generator().manual_seed(0)
        backward = min(len(data), max(1, curvature.GRADIENT_TOKENS // data.shape[1]))
        start = worker.model.model.get_input_embeddings()  # type: ignore[operator]
        handle = start.register_forward_hook(lambda _, __, output: output.requires_grad_())
        with torch.enable_grad():
            for window in data[:backward]:
                curvature.go_back(worker.model.outputs(window.unsqueeze(0)), worker.info.task, generator)
        handle.remove()
        with torch.inference_mode():
            for window in data[backward:]:
                worker.model.outputs(window.unsqueeze(0))

    def gather() -> None:
        curvature.gather(worker.model, data, 0)

    actions = {"bare": bare, "gradients": gradients, "statistics": gather}
    bare()
    spent: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(options.rounds):
        for name, action in actions.items():
            spent[name].append(seconds(action)[0])
    rows = []
    for name, values in spent.items():
        ratios = [b / a for a, b in zip(spent["bare"], values, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((name, f"{statistics.median(values):.2f}", f"{statistics.median(ratios):.2f}", spread))
    title = f"Calibration on {data.numel()} tokens of {options.model}, {options.threads} threads"
    print_table(title, ("what", "median CPU seconds", "× bare", "from, to"), rows)

    passes = 0
    plain = curvature.gather

    def counted(*args: object, **more: object) -> object:
        nonlocal passes
        passes += 1
        return plain(*args, **more)  # type: ignore[arg-type]

    curvature.gather = counted  # type: ignore[assignment]
    linears = [layer.name for layer in worker.info.layers if layer.kind in ("linear", "conv1d")]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTOQ_CACHE"] = cache
        worker.bank = Bank(Path(cache) / "bank", 2**32, 2**30)
        rows.append(("statistics", *(f"{each:.1f}" for each in seconds(worker.calibrate)), str(passes)))
        for text in options.schemes:
            scheme = parse_scheme(text)
            spent_here = seconds(lambda scheme=scheme: [worker.quantized(name, scheme) for name in linears])  # type: ignore[misc]
            rows.append((text, *(f"{each:.1f}" for each in spent_here), str(passes)))
    title = f"{len(linears)} layers one after the other on the same statistics"
    print_table(title, ("what", "CPU seconds", "wall seconds", "calibration passes so far"), rows)


if __name__ == "__main__":
    main()
