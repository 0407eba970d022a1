"""What quantized KV caches lose: all caches at one width, KL on report tokens, beside the sum of what is predicted.

All weights are kept. `as it is` runs the attention of quantized caches on keys and values that are not rounded: what
is left is the rounding of another order of sums. `--alone N` measures every Nth cache alone, too, and says how well the
predictions rank them. Bytes are those of `peak_memory_bytes` for a batch and prompt of the target.

    python benchmarks/kv_cache.py [--model demo:smollm2] [--dtype bfloat16] [--tokens 4096] [--alone 2] [--bits 8,4,2]
"""

from __future__ import annotations

import argparse
import sys

from _report import print_table
from torch import Tensor

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.kv_cache import KeyValue
from autoq.objectives import TableObjective
from autoq.objectives import load as load_objective
from autoq.search.sampler_view import spearman
from autoq.spec import build_spec

KL, PEAK = "kl_nats_per_token", "peak_memory_bytes"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--alone", type=int, default=0, metavar="N")
    parser.add_argument("--bits", default="8,4,2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8192)
    given = parser.parse_args()
    widths = [int(text) for text in given.bits.split(",")]
    spec = build_spec(
        {
            "model": {"id": given.model, "dtype": given.dtype},
            "target": {"name": "generic", "batch_size": given.batch, "prompt_tokens": given.prompt},
            "data": {"report_tokens": given.tokens},
            "objectives": [KL, PEAK],
            "workers": {"cpus": 1},
        }
    )
    evaluator = Evaluator(spec)
    names = [cache.name for cache in evaluator.info.caches]
    texts = [str(KeyValue(bits)) for bits in widths]
    predicted = evaluator.sensitivities(dict.fromkeys(names, texts))
    objective = load_objective(PEAK)
    assert isinstance(objective, TableObjective)

    def measured(assignment: Assignment) -> tuple[float, str]:
        (found,) = (m for m in evaluator.measure(assignment, "report") if m.objective == KL)
        text = f"{found.value:.5f} ± {found.stderr or 0:.5f}"
        print(*list(assignment.caches.values())[:1], len(assignment.caches), text, file=sys.stderr, flush=True)
        return found.value, text

    def row(title: str, assignment: Assignment, kl: str, sum_of_losses: float) -> list[object]:
        size = objective.compute(evaluator.info, assignment, spec.target)
        return [title, kl, f"{sum_of_losses:.5f}", f"{size / 1e6:.1f}"]

    table = [row("as it is", Assignment({}), _floor(evaluator), 0.0)]
    for text in texts:
        everywhere = Assignment.from_dict(dict.fromkeys(names, text))
        total = sum(predicted[name][text] for name in names)
        table.append(row(f"all {text}", everywhere, measured(everywhere)[1], total))
    if given.alone:
        for text in texts:
            some = names[:: given.alone]
            alone = [measured(Assignment.from_dict({name: text}))[0] for name in some]
            guessed = [predicted[name][text] for name in some]
            rank = f"rank {spearman(alone, guessed):.2f}"
            table.append([f"{text} alone", f"{sum(alone):.5f}", f"{sum(guessed):.5f}", rank])
    title = f"KV caches, {given.model} in {given.dtype}, {given.tokens} report tokens"
    print_table(title, ["caches", "KL, nats/token", "predicted", f"MB, {given.batch} x {given.prompt} tokens"], table)


def _floor(evaluator: Evaluator) -> str:
    """The KL of caches that are read as they are, by the attention of those that are not."""
    model = evaluator.model
    reads = {cache.name: lambda keys, values: (keys, values) for cache in evaluator.info.caches}

    def outputs(window: Tensor) -> Tensor:
        model.swap({}, caches=reads)
        try:
            return model.outputs(window[None])[0]
        finally:
            model.restore()

    found = evaluator.compare(Assignment({}), outputs)
    return next(f"{m.value:.5f} ± {m.stderr or 0:.5f}" for m in found.there if m.objective == KL)


if __name__ == "__main__":
    main()
