"""What `autoq plan` predicts, beside what the study then takes: CPU time, in this process, with one thread.

The study is real and starts from nothing but the model: an empty database and an empty cache for bank and statistics.
CPU time, because others may use the machine; so what the disk and waiting take is left out on both sides. Quantizing
and search are one row: what only baselines consist of is made while they are measured.

    python benchmarks/plan.py [--model demo:smollm2] [--schemes …] [--trials 12] [--tokens 1024] [--report 2048]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from _report import print_table

from autoq.cache import cache_dir
from autoq.search.controller import create_study, run_study
from autoq.search.costing import StudyCost, predict
from autoq.search.observer import Observer
from autoq.spec import build_spec
from autoq.store import Store

STAGES = {
    "calibrate": "calibration",
    "report": "report",
}
BOTH = "quantizing the bank, CPU + search"


@dataclass
class Watch(Observer):
    """CPU seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    name: str = ""
    since: float = 0.0

    def stage(self, name: str, total: int | None) -> None:
        now = time.process_time()
        if self.name:
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.since
        self.name, self.since = name, now


def folder_bytes(folder: Path) -> int:
    """What the files below a folder hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def rows(found: StudyCost, measured: dict[str, float]) -> list[tuple[str, ...]]:
    """What, predicted, measured, and their ratio."""
    table: list[tuple[str, ...]] = []
    for what, value in measured.items():
        parts = [found[name] for name in what.split(" + ")]
        figure = dataclasses.replace(parts[-1], value=sum(part.value for part in parts))
        scale, unit = (1e6, "MB") if figure.unit == "bytes" else (1.0, "s")
        ratio = f"{figure.value / value:.2f}" if value else "-"
        table.append((what, f"{figure.value / scale:.2f} {unit}", f"{value / scale:.2f} {unit}", ratio, figure.basis))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--schemes", default="rtn-int8-channel-sym,rtn-int4-g64,hqq-int4-g64,gptq-int3-g64")
    parser.add_argument("--target", default="generic")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--report", type=int, default=2048)
    options = parser.parse_args()
    spec = build_spec(
        {
            "name": "planned",
            "model": {"id": options.model},
            "data": {
                "calibration_tokens": options.tokens,
                "search_tokens": options.tokens,
                "report_tokens": options.report,
                "window_tokens": min(512, options.tokens),
            },
            "target": {"name": options.target},
            "space": {"schemes": options.schemes.split(",")},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "budget": {"trials": options.trials, "stop_confidence": None},
            "workers": {"cpus": 1},
        }
    )
    found = predict(spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = cache_dir()
        os.environ["AUTOQ_CACHE"] = str(folder / "cache")
        (folder / "cache").mkdir()
        for kept in ("demo", "models"):
            if (models / kept).exists():
                (folder / "cache" / kept).symlink_to(models / kept)
        watch = Watch()
        with Store.open(str(folder / "autoq.db")) as store:
            empty = folder_bytes(folder / "cache" / "bank")
            study = create_study(store, spec).id
            run_study(store, study, watch)
            watch.stage("", None)
            trials = store.trials(study)
        measured = {figure: watch.seconds.get(stage, 0.0) for stage, figure in STAGES.items()}
        measured[BOTH] = watch.seconds["quantize"] + watch.seconds["search"]
        measured["the bank on disk"] = float(folder_bytes(folder / "cache" / "bank") - empty)
        measured["database"] = float(sum(file.stat().st_size for file in folder.glob("autoq.db*")))
        measured["memory of a worker"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measured["all of it"] = time.process_time()
    header = ("what", "predicted", "measured", "ratio", "rests on")
    title = f"{options.model}, {len(trials)} trials of {options.tokens} tokens, one thread, CPU time"
    print_table(title, header, rows(found, measured))


if __name__ == "__main__":
    main()
