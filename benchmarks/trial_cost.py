"""What a trial costs beside a bare forward pass, and beside doing it naively.

Three things over the same tokens of the same model, in turn, several rounds in one process:

  bare     one forward pass of the unquantized model over the search part
  trial    `Evaluator.measure` of a mixed assignment whose layers are in the bank
  naive    load the model, quantize every layer, one forward pass, KL and perplexity by the book

    python benchmarks/trial_cost.py [--model demo:smollm2] [--tokens 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from _report import print_table

from autoq import models, plugins
from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.scheme import Keep, parse_scheme
from autoq.spec import build_spec

SCHEMES = [parse_scheme(text) for text in ("rtn-int4-g64", "rtn-int4-g32", "rtn-int8-channel-sym", "hqq-int4-g64")]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    spec = build_spec(
        {
            "model": {"id": options.model},
            "data": {"search_tokens": options.tokens},
            "target": {"name": "generic"},
            "objectives": ["kl_nats_per_token", "perplexity"],
        }
    )
    evaluator = Evaluator(spec)
    evaluator._states.chain = None  # trials that have nothing in common
    linears = [layer.name for layer in evaluator.info.layers if layer.kind in ("linear", "conv1d")]
    pattern = itertools.cycle(SCHEMES)
    assignments = [Assignment({name: next(pattern) for name in linears}) for _ in SCHEMES]
    for assignment in assignments:  # fills the bank and the memory of dequantized weights
        evaluator.measure(assignment, "search")
    chosen = itertools.cycle(assignments)

    def bare() -> None:
        with torch.inference_mode():
            for window in evaluator.parts.search:
                evaluator.model.outputs(window.unsqueeze(0))

    def trial() -> None:
        evaluator.measure(next(chosen), "search")

    def naive() -> None:
        model = models.load(spec.model)
        reference = [model.outputs(w.unsqueeze(0))[0].float().log_softmax(-1) for w in evaluator.parts.search]
        weights = {}
        for name, scheme in next(chosen).items():
            if not isinstance(scheme, Keep):
                method = plugins.load("methods", scheme.method, Method)
                weight = model.weight(name)
                weights[name] = method.quantize(weight, scheme).dequantize(weight.dtype)
        model.swap(weights)
        for window, expected in zip(evaluator.parts.search, reference, strict=True):
            found = model.outputs(window.unsqueeze(0))[0].float().log_softmax(-1)
            (expected.exp() * (expected - found)).sum(-1).mean()
            torch.nn.functional.nll_loss(found[:-1], window[1:])

    bare(), trial()
    times: dict[str, list[float]] = {"bare": [], "trial": [], "naive": []}
    with torch.inference_mode():
        for _ in range(options.rounds):
            times["bare"].append(seconds(bare))
            times["trial"].append(seconds(trial))
        times["naive"] = [seconds(naive) for _ in range(2)]
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = [b / a for a, b in zip(times["bare"], times["trial"], strict=True)]
    title = f"A trial over {options.tokens} tokens of {options.model}, {torch.get_num_threads()} threads"
    rows = [(name, f"{value:.3f}", f"{value / middle['bare']:.2f}") for name, value in middle.items()]
    print_table(title, ("what", "median seconds", "× bare"), rows)
    print(
        f"\ntrial / bare, pair by pair: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
