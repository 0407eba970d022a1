"""What each observer of activation ranges loses: uniform 8 bits with calibrated inputs, KL on report tokens.

Weights are rounded to the nearest of 8 bits per channel (or E4M3), and every linear's inputs too, by a range that
each observer finds on the calibration part. Beside them the same weights with inputs as they are, and with ranges
found while running. `predicted` is the sum over layers of the curvature proxy, of which the search makes its order.

    python benchmarks/observers.py [--model demo:smollm2] [--tokens 1024] [--targets vllm,onnxruntime]
"""

from __future__ import annotations

import argparse
import sys
import time

from _report import print_table

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import OBSERVERS, Keep, parse_scheme
from autoq.search.space import refusal
from autoq.spec import build_spec

KL = "kl_nats_per_token"
WEIGHTS = ("rtn-int8-channel-sym", "rtn-fp8-channel")
INPUTS = ("", "-a8dyn", *(f"-{activation}" for activation in OBSERVERS))


def rows(model: str, target: str, tokens: int) -> list[list[object]]:
    """One row per scheme that the target runs: scheme, KL ± standard error, predicted KL, seconds to choose ranges."""
    spec = build_spec(
        {
            "model": {"id": model},
            "target": {"name": target},
            "data": {"report_tokens": tokens},
            "objectives": [KL, "size_bytes"],
            "workers": {"cpus": 1},
        }
    )
    evaluator = Evaluator(spec)
    refuses = refusal(target, evaluator.target)
    evaluator.calibrate()
    found: list[list[object]] = []
    for weights in WEIGHTS:
        for inputs in INPUTS:
            scheme = parse_scheme(weights + inputs)
            layers = [layer for layer in evaluator.info.layers if layer.kind == "linear"]
            if any(refuses(layer, scheme) for layer in layers):
                continue
            assignment = Assignment(
                {layer.name: scheme if layer in layers else Keep() for layer in evaluator.info.layers}
            )
            begun = time.process_time()
            for layer in layers:
                evaluator.activation(layer.name, scheme)
            spent = time.process_time() - begun
            losses = evaluator.sensitivities({layer.name: [str(scheme)] for layer in layers})
            (measured,) = (m for m in evaluator.measure(assignment, "report") if m.objective == KL)
            predicted = sum(sum(own.values()) for own in losses.values())
            kl = f"{measured.value:.4f} ± {measured.stderr or 0:.4f}"
            print(target, scheme, kl, file=sys.stderr, flush=True)
            found.append([target, str(scheme), kl, f"{predicted:.4f}", f"{spent:.1f}"])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--targets", default="vllm,onnxruntime")
    given = parser.parse_args()
    header = ["target", "scheme", "KL, nats/token", "predicted", "CPU seconds to choose ranges"]
    table = [row for target in given.targets.split(",") for row in rows(given.model, target, given.tokens)]
    print_table(f"Observers, {given.model}, {given.tokens} report tokens", header, table)


if __name__ == "__main__":
    main()
