"""Export and verify the frontier of a finished study, each point in its runtime, and print what was found.

    python benchmarks/ship.py [DATABASE STUDY] [--target NAME] [--limit 16] [--tokens 1024] [--latency]

Without a study, the demo's is run first, with few trials.

Bytes are those on disk against the stored size; `apart` is the KL between the runtime's outputs and the
searched model's, `quality` the runtime's own; seconds are those of one export and one verification in a
process that has imported everything already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _report import print_table

from autoq.search.controller import create_study, run_study
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import load_spec
from autoq.store import Store

FEW = ["budget.trials=12", "budget.report_points=4", "data.report_tokens=4096"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("database", nargs="?")
    parser.add_argument("study", nargs="?", default="demo")
    parser.add_argument("--target")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    rows, passed, seconds = [], 0, ([], [])
    with tempfile.TemporaryDirectory() as folder, Store.open(options.database or f"{folder}/autoq.db") as store:
        if options.database is None:
            run_study(store, create_study(store, load_spec("demo", FEW)).id)
        study = store.study(options.study)
        frontier = store.frontier(study.id, with_assignments=True)
        frontier.sort(key=lambda trial: trial.values(["size_bytes"]))
        step = max(1, len(frontier) // options.limit)
        for trial in frontier[::step]:
            out = Path(folder) / str(trial.number)
            start = time.perf_counter()
            export(store, study, trial, out, options.target)
            seconds[0].append(time.perf_counter() - start)
            start = time.perf_counter()
            report = verify(out, options.tokens, options.latency)
            seconds[1].append(time.perf_counter() - start)
            passed += report.ok
            found = {check.name: check for check in report.checks}
            wrong = [f"{check.name}: {check.found}" for check in report.checks if check.ok is False]
            quality = next((c.found for n, c in found.items() if n.startswith(("kl_", "cosine", "perp"))), "")
            rows.append(
                [
                    trial.number,
                    found["bytes"].found if "bytes" in found else "",
                    found["outputs"].found.partition(" ")[0] if "outputs" in found else "",
                    quality,
                    f"{seconds[0][-1]:.1f}",
                    f"{seconds[1][-1]:.1f}",
                    "; ".join(wrong) or "yes",
                ]
            )
    header = ["trial", "bytes", "apart", "quality", "export s", "verify s", "verified"]
    target = options.target or study.study_spec().target.name
    print_table(f"{study.name} as {target}: {passed} of {len(rows)} frontier points verified", header, rows)
    medians = [f"{statistics.median(each):.1f} s" for each in seconds]
    print(f"\nmedian export {medians[0]}, verify {medians[1]} over {options.tokens} tokens")


if __name__ == "__main__":
    main()
