"""What a number format is worth: every linear of a model under one scheme, bits per weight and held-out quality.

Formats are judged alone, without a search: weights are evaluated as they ship, on the target `generic`, and bits
count every code, scale, zero point and centroid of the linears. KL is to the unquantized model on report tokens
that no method has seen (`wkmeans` calibrates on others).

The demo's checkpoint was stored as Q4_1 once, 16 equal steps per 32 inputs: 4 bits with zero points in groups of 32
are nearly lossless on it, which says nothing; they are left out. In other groups its weights meet steps of many
sizes, a bell again. The last column is the error on Gaussian weights of the shape of one `down_proj`.

    python benchmarks/formats.py [--model demo:smollm2] [--tokens 1024] [--threads 1] [SCHEME …]
"""

from __future__ import annotations

import argparse
import time

import torch
from _report import print_table

from autoq import plugins
from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.scheme import Scheme, parse_scheme
from autoq.spec import build_spec

SCHEMES = (
    "rtn-int3-g64", "nf3-g64", "kmeans3-channel", "wkmeans3-channel", "log3-g64",
    "rtn-int4-g64", "rtn-int4-g64-sym", "hqq-int4-g64", "nf4-g64", "log4-g64", "rtn-fp4-g64", "rtn-fp4-g32",
    "rtn-mxfp4-g32", "rtn-nvfp4-g16", "kmeans4-channel", "wkmeans4-channel",
    "rtn-int6-g64", "rtn-mxfp6_e2m3-g32", "rtn-mxfp6_e3m2-g32", "nf6-g64",
    "rtn-int8-channel-sym", "rtn-fp8-channel", "rtn-fp8-b128x128", "rtn-fp8-g64", "rtn-fp8_e5m2-channel",
    "rtn-mxfp8-g32", "rtn-mxfp8_e5m2-g32",
)  # fmt: skip
GAUSSIAN = (576, 1536)


def gaussian_error(scheme: Scheme) -> float:
    """Squared error over squares on Gaussian weights whose inputs have unequal second moments."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(GAUSSIAN, generator=generator)).bfloat16()
    statistics = {"input_mean_square": torch.randn(GAUSSIAN[1], generator=generator).exp()}
    method = plugins.load("methods", scheme.method, Method)
    found = method.quantize(weight, scheme, statistics if method.uses_statistics(scheme) else None)
    return ((found.dequantize() - weight.float()).square().sum() / weight.float().square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    spec = build_spec(
        {
            "model": {"id": options.model},
            "data": {"report_tokens": options.tokens},
            "target": {"name": "generic"},
            "objectives": ["kl_nats_per_token", "perplexity"],
            "workers": {"cpus": options.threads},
        }
    )
    evaluator = Evaluator(spec)
    linears = [layer for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    weights = sum(layer.out_features * layer.in_features for layer in linears)
    squares = sum(evaluator.model.weight(layer.name).double().square().sum().item() for layer in linears)
    rows = []
    for scheme in map(parse_scheme, options.schemes):
        start = time.process_time()
        off = 0.0
        for layer in linears:
            # Into the bank, from which it is measured.
            delta = evaluator.quantized(layer.name, scheme).dequantize() - evaluator.model.weight(layer.name).float()
            off += delta.double().square().sum().item()
        seconds = time.process_time() - start
        found = {m.objective: m for m in evaluator.measure(Assignment({x.name: scheme for x in linears}), "report")}
        kl = found["kl_nats_per_token"]
        bits = 8 * sum(layer.nbytes(scheme) for layer in linears) / weights
        rows.append(
            (
                str(scheme),
                f"{bits:.2f}",
                f"{kl.value:.4f} ± {kl.stderr or 0:.4f}",
                f"{found['perplexity'].value:.2f}",
                f"{100 * off / squares:.3f}",
                f"{100 * gaussian_error(scheme):.3f}",
            )
        )
        print(f"{scheme}: KL {kl.value:.4f}, {seconds:.0f} s to make", flush=True)
    header = ("scheme", "bits/weight", "KL (nats/token)", "perplexity", "error %", "on Gaussian %")
    title = f"{options.model}: one format for {len(linears)} linears, {kl.n} report tokens"
    print_table(title, header, sorted(rows, key=lambda row: float(row[1])))


if __name__ == "__main__":
    main()
