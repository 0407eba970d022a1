"""Verify: load an export in its runtime and hold it against what the study measured.

Checks, in this order: every file is as it was written; the bytes on disk are the stored size; what the
files say of each layer is the assignment; the runtime's outputs are those of the searched model; its
quality on the report data is the stored one; its latency is, within the machine's noise. What the files
fail is not loaded.

Quality is compared in pairs, on the same tokens: the runtime may be worse than the searched model by the
stored standard error, or three of the difference itself, and better by what rounding had taken from the
searched model; and it must be the stored value within three combined standard errors, as fewer tokens are
another sample. Latency is compared at
one speed of the machine: the unquantized model is timed before and after the export, and what these two
differ by counts as noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import trained
from autoq.assignment import Assignment
from autoq.device import fingerprint
from autoq.display.numbers import size, with_error
from autoq.errors import AutoQError, ModelRefused, NotFound
from autoq.measurement import Measurement
from autoq.shipping import manifest as files
from autoq.shipping.manifest import Manifest, Promise
from autoq.spec import StudySpec, build_spec
from autoq.targets import UNQUANTIZED, Runtime, Target, load_target
from autoq.trained import Fetch

if TYPE_CHECKING:
    from autoq.evaluation import Evaluator

SIZE_TOLERANCE = 0.005
HEADER_BYTES = 1 << 16  # names and shapes in the files, which sizes leave out; nothing beside a real model
ERRORS = 3  # combined standard errors that two samples of one quantity may be apart
LEAST_NOISE = 0.05  # what two runs of one program differ by on a machine that does nothing else
ROUNDING, LEAST_DIFFERENCE = 1e-4, 1e-6
REPORT_TOKENS = 4096
_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None for what could not be compared here, and `note` says why."""

    name: str
    promised: str
    found: str
    ok: bool | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The check as JSON."""
        return vars(self).copy()


@dataclass(frozen=True)
class Report:
    """All checks of one export."""

    folder: str
    study: str
    trial: int
    target: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs beyond its tolerance."""
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON document."""
        told = {"folder": self.folder, "study": self.study, "trial": self.trial, "target": self.target, "ok": self.ok}
        return told | {"checks": [check.to_json() for check in self.checks]}


def _listed(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def verify(
    folder: Path,
    tokens: int | None = REPORT_TOKENS,
    latency: bool = True,
    note: Callable[[str], None] = lambda _: None,
    fetch: Fetch | None = None,
) -> Report:
    """Check an export. `tokens` of the report part are evaluated (None: all that the study reported on);
    `latency` says whether to time it. `note` hears what is going on. `fetch` gives what was trained of the searched
    model, where this machine has no copy; without it such a model is not compared.

    Raises `BadInput` where `folder` is no export of AutoQ, `ExportBroken` where its manifest is broken.
    """
    manifest = files.read(folder)
    checks: list[Check] = []

    def report() -> Report:
        return Report(str(folder), manifest.study, manifest.trial, manifest.target, tuple(checks))

    note("files")
    changed = files.changed_files(folder, manifest.files)
    checks.append(Check("files", f"{len(manifest.files)} files", _listed(changed) or "unchanged", not changed))
    if changed:
        return report()
    assignment = files.read_assignment(folder, manifest)
    checks.append(_bytes(manifest))
    spec = build_spec(manifest.spec)
    target = load_target(spec.target)
    if (missing := target.unavailable()) is not None:
        raise AutoQError(f"target {spec.target.name} cannot run on this machine: {missing}")
    note("load")
    try:
        runtime = target.reload(folder, spec.target.threads)
    except AutoQError as problem:
        checks.append(Check("loads", manifest.runtime, str(problem), False))
        return report()
    with runtime:
        apart = runtime.differences(assignment)
        checks.append(Check("formats", f"{len(assignment)} layers", _listed(apart) or "as assigned", not apart))
        if absent := _absent(assignment, fetch):
            checks.append(absent)
            return report()
        checks += _compare(manifest, assignment, spec, target, runtime, tokens, latency, note)
    return report()


def _absent(assignment: Assignment, fetch: Fetch | None) -> Check | None:
    """That the searched model cannot be made here; None where it can."""
    if not trained.missing(assignment):
        return None
    if fetch is None:
        return Check(
            "quality", "", "not compared", None, "trained layers of the searched model are not here: give --db"
        )
    try:
        trained.place(assignment, fetch)
    except NotFound as problem:
        return Check("quality", "", "not compared", None, f"{problem} in this database: give --db")
    return None


def _bytes(manifest: Manifest) -> Check:
    found = sum(manifest.files[name].bytes for name in manifest.weights)
    off = found / manifest.size_bytes - 1
    fits = abs(found - manifest.size_bytes) <= max(SIZE_TOLERANCE * manifest.size_bytes, HEADER_BYTES)
    return Check("bytes", size(manifest.size_bytes), f"{size(found)} ({off:+.2%})", fits)


def _compare(
    manifest: Manifest,
    assignment: Assignment,
    spec: StudySpec,
    target: Target,
    runtime: Runtime,
    tokens: int | None,
    latency: bool,
    note: Callable[[str], None],
) -> list[Check]:
    """Outputs, quality and latency; all of them need the original model."""
    from autoq.evaluation import Evaluator

    try:
        evaluator = Evaluator(spec)
    except ModelRefused as problem:
        return [Check("quality", "", "not compared", None, f"the original model is not here: {problem}")]
    found = hashlib.sha256(evaluator.parts.report.numpy().tobytes()).hexdigest()
    if found != manifest.report_tokens:
        return [Check("data", "the study's report tokens", "others", False, "the data source has changed since")]
    note("evaluate")
    checks = _quality(manifest, assignment, evaluator, target, runtime, tokens)
    if latency:
        note("time")
        checks += _latency(manifest, evaluator, runtime)
    return checks


def _quality(
    manifest: Manifest,
    assignment: Assignment,
    evaluator: Evaluator,
    target: Target,
    runtime: Runtime,
    tokens: int | None,
) -> list[Check]:
    compared = evaluator.compare(assignment, runtime.outputs, tokens)
    limit = target.logits_tolerance
    if any(evaluator.activation(name, scheme) is not None for name, scheme in assignment.items()):
        limit = max(limit, compared.moved)
    unit = "cosine distance" if evaluator.info.task == "encoder" else "nats/token"
    checks = [
        Check("outputs", f"≤ {limit:.0e} {unit}", f"{compared.apart:.1e} from the searched", compared.apart <= limit)
    ]
    note = f"{compared.tokens} tokens"
    for name, answered in manifest.measurements.items():
        if "task" in answered.detail:
            why = "examples were answered by the searched model, whose outputs the runtime's are held against"
            checks.append(Check(name, _value(answered), "not compared", None, why))
    for here, there in zip(compared.here, compared.there, strict=True):
        promise = manifest.measurements.get(there.objective)
        if promise is None:
            continue
        rounding = max(ROUNDING * abs(promise.value), LEAST_DIFFERENCE)
        chance = ERRORS * compared.paired[there.objective]
        worse = (there.value - here.value) * (1 if evaluator.direction(there.objective) == "minimize" else -1)
        # The searched model's own rounding is noise that the runtime need not have: it may be better by that.
        better = min(compared.apart, target.logits_tolerance)
        slack = max(promise.stderr or 0.0, chance, rounding)
        pair = -max(slack, better) <= worse <= slack
        reach = ERRORS * math.hypot(promise.stderr or 0.0, there.stderr or 0.0)
        stored = promise.part != "report" or abs(there.value - promise.value) <= max(reach, rounding)
        checks.append(
            Check(
                there.objective,
                _value(promise),
                with_error(there.value, there.stderr, there.unit),
                pair and stored,
                f"{note}; searched model {with_error(here.value, here.stderr, here.unit)}",
            )
        )
    return checks


def _value(promise: Promise | Measurement) -> str:
    return with_error(promise.value, promise.stderr, promise.unit)


def _latency(manifest: Manifest, evaluator: Evaluator, runtime: Runtime) -> list[Check]:
    promised = {name: m for name, m in manifest.measurements.items() if UNQUANTIZED in m.detail}
    if not promised:
        return []
    names = ", ".join(promised)
    if manifest.target != manifest.searched_on:
        why = f"the study timed {manifest.searched_on}, this is {manifest.target}"
        return [Check(names, "", "not compared", None, why)]
    if any(m.device != fingerprint() for m in promised.values()):
        return [Check(names, "", "not compared", None, "measured on another device")]
    workload = evaluator.spec.target
    # The export itself, between two looks at how fast the machine is.
    before = _unquantized(evaluator)
    found = {m.objective: m for m in runtime.time(workload)}
    after = _unquantized(evaluator)
    checks = []
    for name, promise in promised.items():
        if name not in found:
            checks.append(Check(name, _value(promise), "not timed", None))
            continue
        now, drift = (before[name] + after[name]) / 2, abs(before[name] - after[name]) / (before[name] + after[name])
        speed = now / promise.detail[UNQUANTIZED]
        measured = found[name]
        value = measured.value / speed
        error = math.hypot((promise.stderr or 0.0) / promise.value, (measured.stderr or 0.0) / measured.value)
        band = max(ERRORS * error, LEAST_NOISE) + drift + manifest.noise.get(name, 0.0)
        off = value / promise.value - 1
        checks.append(
            Check(
                name,
                f"{_value(promise)} ms",
                f"{value:.4g} ms ({off:+.1%})",
                abs(off) <= band,
                f"within {band:.0%}; {measured.value:.4g} ms now, the machine at {1 / speed:.2f} of its speed then",
            )
        )
    return checks


def _unquantized(evaluator: Evaluator) -> dict[str, float]:
    """Phase -> milliseconds of the unquantized model now."""
    timed = evaluator.target.time(evaluator.model, {}, evaluator.spec.target)
    return {m.objective: m.value for m in timed}
