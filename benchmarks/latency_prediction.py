"""How well the table of layer costs predicts whole models that mix schemes, end to end on the target.

A table is timed as a study does it, then whole models are timed end to end in turns with the unquantized one:
random assignments (each layer under any of its choices), such that keep 0, 10, 30 and 60 % of the layers, such
as the small end of a frontier holds (nearly all layers under their lightest choice), and the target's uniform
baselines. Latencies are compared at one speed of the machine: as ratios to the unquantized model, which was timed
beside each of them.

    python benchmarks/latency_prediction.py [--target torch-cpu] [--model demo:smollm2] [--count 12]
    python benchmarks/latency_prediction.py --schemes rtn-int4-g64,rtn-int4-g192,rtn-int8-channel-sym
    python benchmarks/latency_prediction.py --target llama-cpp --dtype float32 --schemes gguf-q8_0,gguf-q5_0,gguf-q4_0
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from _report import print_table
from scipy.stats import spearmanr

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, Scheme, code_bits
from autoq.search.setup import pose
from autoq.search.space import refusal
from autoq.spec import build_spec
from autoq.targets import UNQUANTIZED, _torch_cpu_timing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="torch-cpu")
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--count", type=int, default=12, help="random assignments")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--schemes", help="choices instead of all that the target runs, with commas between")
    options = parser.parse_args()
    spec = build_spec(
        {
            "model": {"id": options.model, "dtype": options.dtype},
            "target": {"name": options.target, "threads": options.threads, "prompt_tokens": options.prompt_tokens},
            "space": {"schemes": options.schemes.split(",")} if options.schemes else {},
            "objectives": ["size_bytes", "latency_decode_ms", "latency_prefill_ms"],
        }
    )
    # What a prediction is held against should itself be certain: more rounds than a study takes.
    _torch_cpu_timing.MIN_ROUNDS = 5
    problem = pose(spec)
    evaluator = Evaluator(spec)
    refuses = refusal(options.target, problem.target)
    baselines = {name: problem.space.uniform(list(p), refuses) for name, p in problem.target.baselines().items()}
    choices = {name: [str(s) for s in schemes] for name, schemes in problem.space.choices.items()}
    for assignment in baselines.values():
        for name in choices:
            choices[name] = list(dict.fromkeys([*choices[name], str(assignment[name])]))
    start = time.perf_counter()
    table = evaluator.cost_table(choices)
    seconds = time.perf_counter() - start
    dice = random.Random(0)
    everything = {layer.name: Keep() for layer in problem.info.layers}

    def mixed(kept: float | None = None) -> Assignment:
        """Each layer under a random choice, in proportions of widths that are random too: even mixes of all
        choices are all as fast. `kept` is the share of layers that are not quantized, where it is given."""
        shares: dict[object, float] = {}
        picked: dict[str, Scheme] = {}
        for name, schemes in problem.space.choices.items():
            if kept is not None:
                schemes = [s for s in schemes if not isinstance(s, Keep)]
                if dice.random() < kept or not schemes:
                    picked[name] = Keep()
                    continue
            widths = [(code_bits(s), getattr(s, "activation", None), getattr(s, "type", None)) for s in schemes]
            weights = [shares.setdefault(w, dice.expovariate(1) ** 2) / widths.count(w) for w in widths]
            picked[name] = dice.choices(schemes, weights)[0]
        return Assignment({**everything, **picked})

    def light(heavier: float) -> Assignment:
        """Each layer under its choice of the fewest bits, but for a share of them under that of the most: what the
        small end of a frontier looks like."""
        picked: dict[str, Scheme] = {}
        for name, schemes in problem.space.choices.items():
            by_bits = sorted((s for s in schemes if not isinstance(s, Keep)), key=code_bits)
            if by_bits:
                picked[name] = by_bits[-1 if dice.random() < heavier else 0]
        return Assignment({**everything, **picked})

    groups: dict[str, dict[str, Assignment]] = {
        "random": {f"random {n}": mixed() for n in range(options.count)},
        "kept": {f"{share:.0%} kept, {n}": mixed(share) for share in (0.0, 0.1, 0.3, 0.6) for n in range(2)},
        "frontier": {f"lightest, {share:.0%} heaviest": light(share) for share in (0.02, 0.05, 0.15, 0.4)},
        "uniform": baselines,
    }
    errors: dict[str, dict[str, list[tuple[float, float]]]] = {}
    rows = []
    for kind, name, assignment in [(kind, name, a) for kind, group in groups.items() for name, a in group.items()]:
        row = [name]
        for measured in evaluator.time(assignment):
            phase = measured.objective
            expected = table.predict(phase, assignment) / table.detail[UNQUANTIZED][phase]
            found = measured.value / measured.detail[UNQUANTIZED]
            errors.setdefault(kind, {}).setdefault(phase, []).append((expected, found))
            row += [f"{measured.value:.2f}", f"{found:.3f}", f"{expected:.3f}", f"{expected / found - 1:+.1%}"]
        rows.append(row)
    phases = list(errors["uniform"])
    header = ["model", *(f"{p.split('_')[1]} {c}" for p in phases for c in ("ms", "of bf16", "predicted", "error"))]
    print_table(f"Predicted and measured latency on {options.target}; table in {seconds:.0f} s", header, rows)
    together: dict[str, list[tuple[float, float]]] = {phase: [] for phase in phases}
    for by_phase in errors.values():
        for phase, pairs in by_phase.items():
            together[phase] += pairs
    for kind, by_phase in {**errors, "all": together}.items():
        for phase, pairs in by_phase.items():
            off = [abs(a / b - 1) for a, b in pairs]
            rank = spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic
            told = f"median error {statistics.median(off):.1%}, worst {max(off):.1%}, Spearman {rank:.3f}"
            print(f"{kind} {phase}: {told}")


if __name__ == "__main__":
    main()
