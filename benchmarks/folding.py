"""What it costs that scales of inputs are folded: uniform assignments with scales that ship and with folded ones.

Folded scales are powers of two, shared by the layers that read the same inputs, and no bytes ship for them. Every
linear of the model under one scheme (a layer whose scales cannot be folded under the scheme with scales that ship,
which is said), the rest as it is; KL to the unquantized model in nats per token on the report part.

    python benchmarks/folding.py [--model demo:smollm2] [--schemes awq-int3-g64 …] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import time

from _report import print_table

from autoq import plugins
from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.scheme import Keep, parse_scheme
from autoq.spec import build_spec

SCHEMES = ("awq-int3-g64", "awq-int4-g64", "smooth-int8-channel-sym-a8dyn")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, default=4096, help="of the report part")
    options = parser.parse_args()
    evaluator = Evaluator(
        build_spec(
            {
                "model": {"id": options.model},
                "data": {"report_tokens": options.tokens},
                "target": {"name": "torch-cpu"},
                "objectives": ["kl_nats_per_token"],
                "workers": {"cpus": 1},
            }
        )
    )
    linears = [layer for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    rows = []
    for shipped in options.schemes:
        for text in (shipped, f"{shipped}-fold"):
            scheme, schemes = parse_scheme(text), {layer.name: Keep() for layer in evaluator.info.layers}
            method = plugins.load("methods", scheme.method, Method)
            own = [layer.name for layer in linears if method.refuses(layer, scheme) is None]
            schemes |= {layer.name: scheme if layer.name in own else parse_scheme(shipped) for layer in linears}
            assignment, began = Assignment(schemes), time.perf_counter()
            evaluator.layers(assignment)
            seconds = time.perf_counter() - began
            (found,) = evaluator.measure(assignment, "report")
            size = (
                sum(layer.nbytes(schemes[layer.name]) for layer in evaluator.info.layers) + evaluator.info.other_bytes
            )
            value = f"{found.value:.4f} ± {found.stderr or 0:.4f}"
            rows.append([text, str(len(own)), value, f"{size / 1e6:.2f} MB", f"{seconds:.0f} s"])
            print(*rows[-1], sep="  ", flush=True)
    head = ["scheme", "layers", "KL, nats/token", "size", "to make, where not in the bank"]
    print_table(f"{len(linears)} linears of {options.model}", head, rows)


if __name__ == "__main__":
    main()
