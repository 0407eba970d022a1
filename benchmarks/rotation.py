"""What rotating a model first is worth: uniform assignments of the model as it is and with `transform: hadamard`.

Every linear under one scheme; KL on report tokens against the unquantized model, in float32, where the rotated model
is the original to rounding (the first row says how nearly). Kurtosis is the mean over the linears' weights, 3 for a
Gaussian. The demo's checkpoint was stored as Q4_1 once: its weights lie on grids of 4 bits, which a rotation mixes,
so formats close to that grid look better without it than they would on a model as it was trained.

    python benchmarks/rotation.py [--model demo:smollm2] [--tokens 1024] [--threads 1]
"""

from __future__ import annotations

import argparse

import torch
from _report import print_table
from torch import Tensor

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.spec import build_spec

SCHEMES = (
    "rtn-int8-channel-sym",
    "rtn-int8-channel-sym-a8dyn",
    "rtn-int4-g64",
    "rtn-int4-channel",
    "rtn-int3-g64",
    "rtn-int2-g64",
)


def evaluator(model: str, transform: str, tokens: int) -> Evaluator:
    return Evaluator(
        build_spec(
            {
                "model": {"id": model, "dtype": "float32", "transform": transform},
                "data": {"search_tokens": 512, "report_tokens": tokens},
                "target": {"name": "torch-cpu"},  # whose 8-bit activations these are
                "objectives": ["kl_nats_per_token"],
            }
        )
    )


def kurtosis(weight: Tensor) -> float:
    values = weight.float()
    return float(values.pow(4).mean() / values.square().mean().square())


def logits(of: Evaluator) -> Tensor:
    with torch.inference_mode():
        return torch.cat([of.model.outputs(window.unsqueeze(0))[0] for window in of.parts.report])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns: list[dict[str, str]] = []
    original = None
    for transform in ("none", "hadamard"):
        here = evaluator(options.model, transform, options.tokens)
        linears = [layer.name for layer in here.info.layers if layer.kind == "linear"]
        found = logits(here).double().log_softmax(-1)
        original = found if original is None else original
        kl = (original.exp() * (original - found)).sum(-1).mean()
        heavy = [kurtosis(here.model.weight(name)) for name in linears]
        total = here.info.other_bytes + sum(layer.nbytes(Keep()) for layer in here.info.layers)
        column = {
            "unquantized, against the original": f"{float(kl):.1e}",
            "weights' kurtosis": f"{sum(heavy) / len(heavy):.2f}, at most {max(heavy):.0f}",
            "MB unquantized, in float32": f"{total / 1e6:.1f}",
        }
        del found
        for text in SCHEMES:
            schemes = {layer.name: Keep() for layer in here.info.layers} | dict.fromkeys(linears, parse_scheme(text))
            (kl,) = here.measure(Assignment(schemes), "report")
            column[text] = f"{kl.value:.4f} ± {kl.stderr or 0.0:.4f}"
            print(f"{transform} {text}: {column[text]}", flush=True)
        columns.append(column)
    title = f"Linears of {options.model} under one scheme, KL in nats/token over {options.tokens} report tokens"
    print_table(title, ("", "as it is", "rotated"), [(name, *(c[name] for c in columns)) for name in columns[0]])


if __name__ == "__main__":
    main()
