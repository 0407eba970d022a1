"""The model card: what the export is, how to run it, what was measured, and where it stands."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoq.assignment import Assignment
from autoq.display.compare import quality_objective, sort_objective
from autoq.display.numbers import full, size
from autoq.measurement import Measurement
from autoq.shipping import picture
from autoq.shipping.manifest import ASSIGNMENT, MANIFEST, PICTURE, Manifest

if TYPE_CHECKING:
    from autoq.store import StudyRecord, TrialRecord

_PLAIN = re.compile(r"[\w./-]+|demo:[\w-]+", re.ASCII)  # a text that YAML takes as it stands


def frontier_picture(study: StudyRecord, frontier: Sequence[TrialRecord], trial: TrialRecord) -> str | None:
    """The frontier and the baselines as SVG, quality against size; None where the study has no quality objective
    beside a size."""
    quality, size_objective = quality_objective(study.objectives), sort_objective(study.objectives)
    if quality is None or quality == size_objective or quality.name not in trial.best_measurements():
        return None
    # Values of the two parts of the data are not drawn as one: the trial's own part decides.
    part = trial.best_measurements()[quality.name].part
    dots = []
    for other in {t.number: t for t in (*frontier, trial)}.values():
        x, y = other.best_measurements().get(size_objective.name), other.measurements.get((quality.name, part))
        if x is not None and y is not None:
            dots.append(picture.Dot(x.value, y.value, y.stderr or 0.0, other.baseline, other.number == trial.number))
    in_bytes = size_objective.unit == "bytes"
    unit = "MB" if in_bytes else size_objective.unit
    return picture.svg(
        dots,
        f"{study.name}: frontier and baselines; trial {trial.number} is circled",
        f"{size_objective.name} ({unit})",
        f"{quality.name} ({quality.unit})",
        1e6 if in_bytes else 1.0,
    )


def card(manifest: Manifest, assignment: Assignment, measurements: Mapping[str, Measurement], drawn: bool) -> str:
    """The card as Markdown."""
    model = manifest.spec["model"]["id"]
    counts = Counter(str(scheme) for scheme in assignment.values())
    transform = manifest.spec["model"].get("transform", "none")
    rotated = [f"Its weights were transformed before ({transform}), which leaves what it computes.", ""]
    lines = [
        "---",
        f"base_model: {model if _PLAIN.fullmatch(model) else json.dumps(model)}",
        "library_name: autoq",
        "tags: [quantized, mixed-precision]",
        "---",
        "",
        f"# {' '.join(model.split())}, quantized layer by layer",
        "",
        f"{manifest.written_as}, {size(manifest.size_bytes)}.",
        f"Trial {manifest.trial} of the study `{manifest.study}`, found by AutoQ {manifest.autoq}.",
        "",
        *(rotated if transform != "none" else []),
        "## Run it",
        "",
        "```",
        manifest.run,
        "```",
        "",
        "## What was measured",
        "",
        "| objective | value |",
        "|---|---|",
        *(f"| {name} | {full(measurement)} |" for name, measurement in measurements.items()),
        "",
    ]
    devices = sorted({m.device for m in measurements.values() if m.device})
    if devices:
        lines += [f"On {'; '.join(devices)}.", ""]
    if drawn:
        lines += [f"![The frontier of the study]({PICTURE})", ""]
    lines += [
        "## Layers",
        "",
        "| scheme | layers |",
        "|---|--:|",
        *(f"| {scheme} | {count} |" for scheme, count in counts.most_common()),
        "",
        *(
            [f"{len(assignment.trained)} layers were trained after they were quantized.", ""]
            if assignment.trained
            else []
        ),
        f"Every layer's scheme is in `{ASSIGNMENT}`; data, seeds, versions and the hash of every file are in",
        f"`{MANIFEST}`. `autoq verify` on this folder loads it in its runtime and holds it against these numbers.",
        "",
    ]
    return "\n".join(lines)
