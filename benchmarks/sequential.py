"""What quantization in sequence gives: uniform assignments, each layer alone and by what the layers before it leave.

Every linear of the model under one scheme, the rest as it is; KL to the unquantized model in nats per token, on the
search and the report part, which nothing was calibrated on; the difference in pairs, token by token; seconds to make
all layers, alone and in sequence. The calibration text is the same for both.

    python benchmarks/sequential.py [--model demo:smollm2] [--schemes gptq-int3-g64 gptq-int4-g64] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _report import print_table

from autoq import plugins, trained
from autoq.assignment import Assignment
from autoq.bank import digest, pack
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.scheme import Keep, parse_scheme
from autoq.sequential import sequenced
from autoq.spec import build_spec
from autoq.statistics import mean_and_stderr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--schemes", nargs="+", default=["gptq-int3-g64", "gptq-int4-g64"])
    parser.add_argument("--tokens", type=int, default=4096, help="of the report part")
    options = parser.parse_args()
    evaluator = Evaluator(
        build_spec(
            {
                "model": {"id": options.model},
                "data": {"report_tokens": options.tokens},
                "target": {"name": "generic"},
                "objectives": ["kl_nats_per_token"],
                "workers": {"cpus": 1},
            }
        )
    )
    evaluator.calibrate()
    linears = [layer.name for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    rows = []
    for text in options.schemes:
        scheme = parse_scheme(text)
        alone = Assignment({x.name: scheme if x.name in linears else Keep() for x in evaluator.info.layers})
        method, began = plugins.load("methods", scheme.method, Method), time.perf_counter()
        for name in linears:
            method.quantize(evaluator.model.weight(name), scheme, evaluator.statistics(name))
        seconds = [time.perf_counter() - began]
        began = time.perf_counter()
        layers = sequenced(evaluator, alone, lambda done, of: print(f"{done}/{of}", flush=True)).layers
        seconds.append(time.perf_counter() - began)
        contents = {digest(layer): pack(layer) for layer in layers.values()}
        after = Assignment(alone, {name: digest(layer) for name, layer in layers.items()})
        trained.place(after, lambda names, contents=contents: {name: contents[name] for name in names})
        for part in ("search", "report"):
            found = [evaluator.measure(each, part)[0] for each in (alone, after)]
            values = [each.per_token for each in found]
            assert values[0] is not None
            assert values[1] is not None
            off, stderr, _ = mean_and_stderr(np.asarray(values[1], np.float64) - values[0])
            rows.append(
                [
                    text,
                    part,
                    *(f"{each.value:.4f} ± {each.stderr or 0:.4f}" for each in found),
                    f"{off:+.4f} ± {stderr or 0:.4f}",
                    *(f"{each:.0f} s" for each in seconds),
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
    head = ["scheme", "part", "each alone", "in sequence", "difference", "make: alone", "in sequence"]
    print_table(f"{len(linears)} linears of {options.model}", head, rows)


if __name__ == "__main__":
    main()
