"""Whether pruning pays: uniform assignments, pruned and not, by bits per weight and held-out loss.

Every searched linear of the demo model under one scheme; bits per weight are those of these layers with all that
ships (codes, scales, zero points, masks), KL is against the unquantized model on report tokens. Pruned weights
whose survivors stay as they are have the model's dtype, bfloat16.

    python benchmarks/sparsity.py [--model demo:smollm2] [--tokens 1024] [--threads 1]
"""

from __future__ import annotations

import argparse

import torch
from _report import print_table

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.spec import build_spec

DENSE = ("rtn-int8-channel-sym", "rtn-int6-g64", "rtn-int5-g64", "rtn-int4-g64", "rtn-int3-g64", "rtn-int2-g64")
INNER = ("", "-int8-channel-sym", "-int4-g64")
PRUNED = tuple(f"{method}{p}{inner}" for p in ("24", "50") for method in ("magnitude", "wanda") for inner in INNER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = build_spec(
        {
            "model": {"id": options.model},
            "data": {"search_tokens": 512, "report_tokens": options.tokens},
            "target": {"name": "generic"},
            "objectives": ["kl_nats_per_token"],
        }
    )
    evaluator = Evaluator(spec)
    linears = [layer for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    weights = sum(layer.parameters for layer in linears)
    rows = []
    for text in (*DENSE, *PRUNED):
        scheme = parse_scheme(text)
        schemes = {layer.name: Keep() for layer in evaluator.info.layers} | {layer.name: scheme for layer in linears}
        (kl,) = evaluator.measure(Assignment(schemes), "report")
        bits = 8 * sum(layer.nbytes(scheme) for layer in linears) / weights
        rows.append((bits, text, f"{kl.value:.4f} ± {kl.stderr or 0.0:.4f}"))
        print(f"{text}: {bits:.2f} bits, KL {rows[-1][2]}", flush=True)
    cells = [(text, f"{bits:.2f}", kl) for bits, text, kl in sorted(rows)]
    title = f"{len(linears)} linears of {options.model} under one scheme, {options.tokens} report tokens"
    print_table(title, ("scheme", "bits per weight", "KL (nats/token)"), cells)


if __name__ == "__main__":
    main()
