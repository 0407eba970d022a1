"""Export: a stored trial becomes a folder that its runtime loads.

Everything is written into a folder beside the output, which is moved into place when it is whole: an
export that was interrupted leaves nothing under the name that was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import __version__, folding, plugins, trained
from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, SchemeRefused, UnknownName
from autoq.layer import ModelInfo
from autoq.scheme import Keep
from autoq.shipping import manifest as files
from autoq.shipping.card import card, frontier_picture
from autoq.spec import StudySpec, TargetSpec, WorkersSpec
from autoq.targets import Exported, Target, cannot_run, load_target

if TYPE_CHECKING:
    from autoq.evaluation import Evaluator
    from autoq.methods import QuantizedWeight
    from autoq.store import Store, StudyRecord, TrialRecord

_RECORDED = ("torch", "transformers", "safetensors", "numpy", "gguf", "libgguf", "compressed-tensors", "onnxruntime")


def exporting_targets() -> list[str]:
    """Names, as specs write them, of the targets that export."""
    names = plugins.names("targets")
    return [n.replace("_", "-") for n in names if plugins.load("targets", n, Target).exports() is not None]


def shipped_spec(spec: StudySpec, target: str | None) -> StudySpec:
    """The study's spec for the export's runtime, in one process on the CPU. Raises `BadInput`."""
    name = target or spec.target.name
    if name.replace("-", "_") not in plugins.names("targets"):
        raise UnknownName("target", name[:80], exporting_targets())
    wanted = TargetSpec(**{**spec.target.model_dump(), "name": name, "device": None})
    if load_target(wanted).exports() is None:
        raise BadInput(f"target {name} exports nothing; choose --target from {', '.join(exporting_targets())}")
    return spec.model_copy(update={"target": wanted, "workers": WorkersSpec(cpus=spec.workers.cpus)})


def refuse_unrunnable(trial: TrialRecord, info: ModelInfo, spec: StudySpec, target: Target) -> None:
    """Refuse an assignment that the target cannot run, naming layers and rules (`SchemeRefused`)."""
    assert trial.assignment is not None
    broken = []
    for name, scheme in trial.assignment.items():
        if (rule := target.refuses(info.layer(name), scheme)) is not None:
            broken.append(f"{name} as {scheme} ({rule})")
    caches = {cache.name: cache for cache in info.caches}
    for name, cached in trial.assignment.caches.items():
        if (rule := target.refuses_cache(caches[name], cached)) is not None:
            broken.append(f"{name} as {cached} ({rule})")
    if target.fuses and not broken:
        groups: dict[str, dict[str, str]] = {}
        for layer in info.layers:
            if layer.fusion_group:
                scheme = trial.assignment.get(layer.name, Keep())
                groups.setdefault(layer.fusion_group, {})[layer.name] = str(scheme)
        for members in groups.values():
            if len(set(members.values())) > 1:
                told = ", ".join(f"{name} as {scheme}" for name, scheme in members.items())
                broken.append(f"{told} (they run as one layer and must share a scheme)")
    if not broken and (rule := folding.conflict(info.layers, trial.assignment, trial.assignment.caches)) is not None:
        broken.append(rule)
    if broken:
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise SchemeRefused(f"target {spec.target.name} cannot run trial {trial.number}: {'; '.join(broken[:3])}{more}")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the body has ended well, and vanishes when it has not."""
    parent = out.parent
    if not parent.is_dir():
        raise BadInput(f"--out {str(out)!r}: the folder {str(parent)!r} is not there; make it first")
    if out.exists() or out.is_symlink():
        raise BadInput(f"--out {str(out)!r} exists; name a folder that is not there yet")
    for left in parent.glob(f".{out.name}.partial-*"):
        # What was killed could not clean up. A number that no process has is of one that is gone.
        number = left.name.rpartition("-")[2]
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    partial = parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    except OSError as problem:
        raise AutoQError(f"the export cannot be written to {str(parent)!r}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _noise(costs: Mapping[str, Any] | None) -> dict[str, float]:
    """Phase -> how far the machine's speed moved while the study's table was timed."""
    return dict((costs or {}).get("detail", {}).get("drift", {}))


def export(
    store: Store,
    study: StudyRecord,
    trial: TrialRecord,
    out: Path,
    target_name: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> files.Manifest:
    """Write `trial` of `study` into the new folder `out` for a target (default: the study's own).

    `note` hears what is going on. Raises `BadInput` for a trial or target that cannot be exported and an
    `out` that is there, `AutoQError` where the disk or the format refuses; then nothing is left of it.
    """
    if trial.state != "complete" or trial.assignment is None:
        raise BadInput(f"trial {trial.number} of {study.name!r} is {trial.state}; only a complete one can be exported")
    spec = shipped_spec(study.study_spec(), target_name)
    target = load_target(spec.target)
    if (missing := target.unavailable()) is not None:
        raise AutoQError(f"target {spec.target.name} cannot export on this machine: {missing}")
    from autoq import models

    info = models.inspect(spec.model)
    if (rule := cannot_run(target, info)) is not None:
        raise BadInput(f"target {spec.target.name} cannot run {spec.model.id!r}: {rule}")
    refuse_unrunnable(trial, info, spec, target)
    with _beside(out) as folder:
        note("load")
        from autoq.evaluation import Evaluator

        evaluator = Evaluator(spec)
        note("quantize")
        chosen = {layer.name: trial.assignment.get(layer.name, Keep()) for layer in info.layers}
        trained.place(trial.assignment, store.trained_layers)
        weights = evaluator.layers(Assignment(chosen, trial.assignment.trained, trial.assignment.caches), chosen)
        note("write")
        written = _written(evaluator, weights, folder)
        other = target.other_bytes(info, spec.model)
        size = other + sum(layer.nbytes(chosen[layer.name]) for layer in info.layers)
        measurements = trial.best_measurements()
        manifest = files.Manifest.model_validate(
            {
                "autoq": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "study": study.name,
                "trial": trial.number,
                "target": spec.target.name,
                "searched_on": study.study_spec().target.name,
                "runtime": target.runtime(),
                "written_as": written.format,
                "run": written.run.replace("{folder!r}", repr(out.name)).replace("{folder}", out.name),
                "spec": spec.model_dump(mode="json"),
                "hash": trial.assignment.hash,
                "size_bytes": size,
                "other_bytes": other,
                "measurements": {name: m.to_json() for name, m in measurements.items()},
                "weights": written.weights,
                "report_tokens": hashlib.sha256(evaluator.parts.report.numpy().tobytes()).hexdigest(),
                "versions": _versions(),
                "noise": _noise(store.table(study.id, "costs")),
                "files": {},
            }
        )
        drawn = frontier_picture(study, [*store.frontier(study.id), *_baselines(store, study)], trial)
        if drawn is not None:
            (folder / files.PICTURE).write_text(drawn, encoding="utf-8")
        (folder / files.ASSIGNMENT).write_text(trial.assignment.json, encoding="utf-8")
        text = card(manifest, trial.assignment, measurements, drawn is not None)
        (folder / files.CARD).write_text(text, encoding="utf-8")
        entries = {name: files.digest(path) for name, path in sorted(files.files_of(folder).items())}
        manifest = manifest.model_copy(update={"files": entries})
        files.write(folder, manifest)
    return manifest


def _written(evaluator: Evaluator, weights: Mapping[str, QuantizedWeight], folder: Path) -> Exported:
    """What the target wrote. Whatever a format's library raises becomes one line."""
    try:
        return evaluator.export(weights, folder)
    except (AutoQError, OSError):
        raise
    except Exception as problem:  # safetensors, gguf and onnx raise what they like for a disk that is full
        raise AutoQError(f"the export failed: {type(problem).__name__}: {problem}") from problem


def _baselines(store: Store, study: StudyRecord) -> list[TrialRecord]:
    return [trial for trial in store.trials(study.id, states=("complete",)) if trial.baseline is not None]
