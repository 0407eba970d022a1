"""llama.cpp's own presets beside AutoQ's frontier: bytes, quality and speed of the real files.

Every row is one GGUF file, written by the same exporter, loaded by llama.cpp and evaluated by it on the same
report tokens, which no search saw. Speed is taken in two sweeps over all files, the second in reverse, each
file in turns with the unquantized model, and stated at that model's median speed.

The demo's checkpoint was stored as Q4_1 once, so Q4_1, and Q4_K on rows that 256 divides, come out nearly
lossless on it. Both are left out on both sides: a preset's Q4_K is replaced by Q5_0, which is what llama.cpp
itself takes where Q4_K does not fit, and the row says so.

    python benchmarks/gguf_presets.py [--db URL --study NAME] [--trials 72] [--points 8] [--tokens 4096]

Without a study of the spec `llama-cpp`, one is run first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _report import print_table

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import Gguf, Scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import load_spec
from autoq.store import Store, StudyRecord
from autoq.targets import UNQUANTIZED

DECODE, PREFILL = "latency_decode_ms", "latency_prefill_ms"
LEFT_OUT, INSTEAD = "q4_k", "q5_0"
GOALS = ("q4_k_m", "q4_0")


@dataclass
class Row:
    """One file and what was measured of it; `ratios` are latencies over the unquantized model's."""

    name: str
    assignment: Assignment
    ours: bool = False
    bytes: int = 0
    kl: float = math.nan
    kl_stderr: float = 0.0
    perplexity: float = math.nan
    ratios: dict[str, list[float]] = field(default_factory=lambda: {DECODE: [], PREFILL: []})

    def ratio(self, phase: str) -> float:
        return statistics.fmean(self.ratios[phase])


def without(schemes: Mapping[str, Scheme]) -> tuple[dict[str, Scheme], bool]:
    """A preset without what is left out, and whether it had any."""
    changed = {
        name: Gguf(INSTEAD) if isinstance(scheme, Gguf) and scheme.type == LEFT_OUT else scheme
        for name, scheme in schemes.items()
    }
    return changed, changed != dict(schemes)


def preset_rows(evaluator: Evaluator) -> list[Row]:
    rows = []
    for name, schemes in evaluator.target.presets(evaluator.info).items():
        replaced, some = without(schemes)
        rows.append(Row(name + (f", {INSTEAD} for {LEFT_OUT}" if some else ""), Assignment(replaced)))
    return rows


def frontier_rows(store: Store, study: StudyRecord, count: int) -> list[Row]:
    """Points of the frontier, spread over sizes, without the presets that were tried as baselines."""
    found = [t for t in store.frontier(study.id, with_assignments=True) if t.baseline is None and t.assignment]
    found.sort(key=lambda trial: trial.best_measurements()["size_bytes"].value)
    step = max(1.0, (len(found) - 1) / max(1, count - 1))
    chosen = {round(i * step): None for i in range(count) if round(i * step) < len(found)}
    return [Row(f"trial {found[i].number}", found[i].assignment, ours=True) for i in chosen]  # type: ignore[arg-type]


def measure_quality(evaluator: Evaluator, row: Row, tokens: int, folder: Path) -> None:
    weights = {name: evaluator.quantized(name, scheme) for name, scheme in row.assignment.items()}
    exported = evaluator.target.export(evaluator.model, weights, folder, evaluator.statistics)
    row.bytes = sum((folder / name).stat().st_size for name in exported.weights)
    with evaluator.target.reload(folder, evaluator.spec.target.threads) as runtime:
        there = {m.objective: m for m in evaluator.compare(row.assignment, runtime.outputs, tokens).there}
    row.kl, row.kl_stderr = there["kl_nats_per_token"].value, there["kl_nats_per_token"].stderr or 0.0
    row.perplexity = there["perplexity"].value


def measure_speed(evaluator: Evaluator, rows: Sequence[Row]) -> dict[str, float]:
    """Fills in the ratios; gives back the unquantized model's median latencies."""
    beside: dict[str, list[float]] = {DECODE: [], PREFILL: []}
    for row in (*rows, *reversed(rows)):
        weights = {name: evaluator.quantized(name, scheme) for name, scheme in row.assignment.items()}
        for found in evaluator.target.time(evaluator.model, weights, evaluator.spec.target):
            beside[found.objective].append(found.detail[UNQUANTIZED])
            row.ratios[found.objective].append(found.value / found.detail[UNQUANTIZED])
    return {phase: statistics.median(values) for phase, values in beside.items()}


def show(rows: Sequence[Row], unquantized: Mapping[str, float], prompt: int, title: str) -> None:
    cells = [
        (
            row.name,
            "AutoQ" if row.ours else "llama.cpp",
            f"{row.bytes / 1e6:.1f}",
            f"{row.kl:.4f} ± {row.kl_stderr:.4f}",
            f"{row.perplexity:.2f}",
            f"{1e3 / (row.ratio(DECODE) * unquantized[DECODE]):.1f}",
            f"{1e3 * prompt / (row.ratio(PREFILL) * unquantized[PREFILL]):.0f}",
        )
        for row in sorted(rows, key=lambda row: row.bytes)
    ]
    header = ("file", "made by", "MB", "KL (nats/token)", "perplexity", "decode tokens/s", "prefill tokens/s")
    print_table(title, header, cells)
    for goal in GOALS:
        preset = next(row for row in rows if row.name.partition(",")[0] == goal)
        rivals = [row for row in rows if row.ours and row.bytes <= preset.bytes]
        for what, able in (
            ("", rivals),
            (", decode no slower", [r for r in rivals if r.ratio(DECODE) <= preset.ratio(DECODE)]),
        ):
            best = min(able, key=lambda row: row.kl, default=None)
            told = "none" if best is None else f"{best.name}, KL {best.kl / preset.kl:.2f} of it"
            print(f"- {preset.name}, no larger{what}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db")
    parser.add_argument("--study", default="llama-cpp")
    parser.add_argument("--trials", type=int, default=72)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store.open(options.db or str(Path(scratch, "autoq.db")))
        if options.db is None:
            spec = load_spec("llama-cpp", [f"budget.trials={options.trials}", "budget.report_points=1"])
            study = create_study(store, spec)
            run_study(store, study.id)
        else:
            study = store.study(options.study)
        spec = study.study_spec()
        evaluator = Evaluator(spec.model_copy(update={"objectives": ("kl_nats_per_token", "perplexity")}))
        rows = [*preset_rows(evaluator), *frontier_rows(store, study, options.points)]
        for number, row in enumerate(rows):
            folder = Path(scratch, str(number))
            folder.mkdir()
            measure_quality(evaluator, row, options.tokens, folder)
            for file in folder.iterdir():
                file.unlink()
        unquantized = measure_speed(evaluator, rows)
    title = f"GGUF files of {spec.model.id}, {evaluator.target.runtime()}, {spec.target.threads} threads"
    show(rows, unquantized, spec.target.prompt_tokens, title)


if __name__ == "__main__":
    main()
