"""The Python API: `autoq.search` runs a study, `autoq.open` finds one, `Study` reads it.

    import autoq

    study = autoq.search("demo")
    study.frontier()                                                    # a pandas frame
    study.pick(max={"size_bytes": 90e6}, best="kl_nats_per_token")      # one trial, with its assignment

What comes back is what is stored; nothing here measures.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.errors import AutoQError, BadInput, UnknownName
from autoq.store import Store, StudyObjective, StudyRecord, TrialRecord

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from autoq.search.observer import Observer
    from autoq.spec import Bound, StudySpec

DEFAULT_DB = "autoq.db"
Limits = Mapping[str, float | str]


def default_db() -> str:
    """The database that is used where none is named: `AUTOQ_DB`, else `autoq.db` in this folder."""
    return os.environ.get("AUTOQ_DB") or DEFAULT_DB


def read_limits(limits: Limits, known: Sequence[str]) -> dict[str, float]:
    """Limits per objective as numbers; `120MB` is read where the objective is in bytes.

    Raises `UnknownName` with the measured objectives, and `BadInput` for what is no finite number.
    """
    from autoq.spec import parse_bound

    if not isinstance(limits, Mapping):
        raise BadInput(f"limits must map objectives to values, as {{'size_bytes': '90MB'}} does (got {limits!r})")
    numbers: dict[str, float] = {}
    for name, value in limits.items():
        if name not in known:
            raise UnknownName("measured objective", name, known)
        try:
            if isinstance(value, bool):
                raise TypeError
            numbers[name] = float(parse_bound(name, value))  # type: ignore[arg-type]
        except (ValueError, TypeError) as problem:
            sized = isinstance(problem, ValueError) and name.endswith("_bytes")
            raise BadInput(f"the limit on {name} {problem if sized else 'must be a number'} (got {value!r})") from None
        if math.isnan(numbers[name]):
            raise BadInput(f"the limit on {name} must be a number (got {value!r})")
        if math.isinf(numbers[name]):
            raise BadInput(f"the limit on {name} must be finite (got {value!r}); leave it out for none")
    return numbers


def read_both(maximum: Limits, minimum: Limits, known: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Upper and lower limits. Raises as `read_limits` does, and `BadInput` where a minimum is above its maximum."""
    upper, lower = read_limits(maximum, known), read_limits(minimum, known)
    for name in upper.keys() & lower.keys():
        if lower[name] > upper[name]:
            raise BadInput(
                f"the limits on {name} exclude each other: at least {lower[name]:.10g}, at most {upper[name]:.10g}"
            )
    return upper, lower


def bounds(study: StudyRecord, maximum: Limits, minimum: Limits) -> dict[str, Bound]:
    """Limits on objectives of the study as bounds of a spec. Raises as `read_limits` does, and `BadInput` where
    a minimum is above its maximum."""
    from autoq.spec import Bound

    upper, lower = read_both(maximum, minimum, [objective.name for objective in study.objectives])
    return {name: Bound(max=upper.get(name), min=lower.get(name)) for name in [*upper, *(lower.keys() - upper)]}


def measured_objectives(trials: Sequence[TrialRecord], objectives: Sequence[StudyObjective]) -> dict[str, str]:
    """Name -> unit of everything these trials were measured by, the study's objectives first."""
    units = {objective.name: objective.unit for objective in objectives}
    for trial in trials:
        units |= {name: m.unit for (name, _), m in sorted(trial.measurements.items()) if name not in units}
    return units


def excess(trial: TrialRecord, maximum: Mapping[str, float], minimum: Mapping[str, float]) -> dict[str, float]:
    """Per limit that the trial breaks, by how much of the limit; empty where it keeps all of them.

    A trial that was not measured by an objective breaks every limit on it.
    """
    values = {name: measurement.value for name, measurement in trial.best_measurements().items()}
    broken: dict[str, float] = {}
    for name, limit in maximum.items():
        value = values.get(name, float("inf"))
        if value > limit:
            broken[name] = (value - limit) / (abs(limit) or 1.0)
    for name, limit in minimum.items():
        value = values.get(name, float("-inf"))
        if value < limit:
            broken[name] = (limit - value) / (abs(limit) or 1.0)
    return broken


def pick(
    study: StudyRecord, frontier: Sequence[TrialRecord], maximum: Limits, minimum: Limits, best: str | None
) -> TrialRecord:
    """The frontier trial that keeps all limits and is best in one objective (default: the study's first).

    Trials are ranked by the search part: each of them has it, and what is reported of the one that is
    picked stays untouched by the picking. Limits are held against reported values where there are any.
    Equal ones are decided by the study's other objectives in their order, then by number. Raises
    `UnknownName` for objectives that were not measured, `BadInput` for limits that exclude each other, and
    `AutoQError` naming the closest trial where none fits.
    """
    units = measured_objectives(frontier, study.objectives)
    upper, lower = read_both(maximum, minimum, tuple(units) if frontier else study.study_spec().measured)
    directions = {objective.name: objective.direction for objective in study.objectives}
    if best is not None and best not in directions:
        raise UnknownName("objective of this study", best, directions)
    if not frontier:
        raise AutoQError(f"study {study.name!r} has no frontier yet: no feasible trial is complete")
    fitting = [trial for trial in frontier if not excess(trial, upper, lower)]
    if not fitting:
        raise AutoQError(_nothing_fits(study, frontier, upper, lower, units))
    order = [best or study.objectives[0].name, *directions]

    def rank(trial: TrialRecord) -> tuple[float, ...]:
        values = zip(order, trial.values(order), strict=True)
        return (*(value if directions[name] == "minimize" else -value for name, value in values), trial.number)

    return min(fitting, key=rank)


def _nothing_fits(
    study: StudyRecord,
    frontier: Sequence[TrialRecord],
    upper: Mapping[str, float],
    lower: Mapping[str, float],
    units: Mapping[str, str],
) -> str:
    from autoq.display.numbers import quantity

    closest = min(frontier, key=lambda trial: (sum(excess(trial, upper, lower).values()), trial.number))
    broken = excess(closest, upper, lower)
    values = closest.best_measurements()
    # A miss by less than the digits shown would read as a hit.
    shown = {(n, quantity(limit, units[n])) for limits in (upper, lower) for n, limit in limits.items()}
    near = {name for name in broken if name in values and (name, quantity(values[name].value, units[name])) in shown}

    def text(name: str, value: float) -> str:
        return f"{value:.10g} {units[name]}" if name in near else quantity(value, units[name])

    wanted = [f"{name} at most {text(name, limit)}" for name, limit in upper.items()]
    wanted += [f"{name} at least {text(name, limit)}" for name, limit in lower.items()]
    has = [f"{name} {text(name, values[name].value)}" for name in broken if name in values]
    return (
        f"no point on the frontier of {study.name!r} has {' and '.join(wanted)}; "
        f"the closest is trial {closest.number} with {' and '.join(has) or 'no such measurement'}"
    )


class Study:
    """One stored study, for notebooks. Reads the database anew at every call."""

    def __init__(self, store: Store, study_id: int) -> None:
        self._store = store
        self.id = study_id

    def __repr__(self) -> str:
        return f"Study({self.record.name!r}, {self.record.state})"

    @property
    def record(self) -> StudyRecord:
        """Name, state, spec and objectives."""
        return self._store.study(self.id)

    def trial(self, number: int) -> TrialRecord:
        """One trial with its assignment. Raises `NotFound`."""
        return self._store.trial(self.id, number)

    def pick(self, *, max: Limits | None = None, min: Limits | None = None, best: str | None = None) -> TrialRecord:  # noqa: A002
        """The frontier's trial within the limits that is best in one objective; see `pick`."""
        chosen = pick(self.record, self._store.frontier(self.id), max or {}, min or {}, best)
        return self.trial(chosen.number)

    def export(self, number: int, out: str | Path, *, target: str | None = None) -> Path:
        """Write a trial as a checkpoint for `target` (default: the study's) into the new folder `out`.

        Raises `BadInput` for a trial or target that cannot be exported and a folder that is there.
        """
        from autoq.shipping.export import export

        export(self._store, self.record, self.trial(number), Path(out), target)
        return Path(out)

    def frontier(self) -> pd.DataFrame:
        """The frontier as a frame, one row a trial; columns as in `trials`, and `no_better_than`: the numbers of
        the points that it is better than in nothing, beyond noise."""
        from autoq.display.ties import stored_ties

        record, points = self.record, self._store.frontier(self.id)
        frame = _frame(record, points)
        frame["no_better_than"] = list(stored_ties(self._store, record, points).values())
        return frame

    def trials(self) -> pd.DataFrame:
        """All trials as a frame, indexed by number: state and origin, then for each objective the value
        (reported where it was), `…_stderr`, `…_kind` and `…_part`."""
        return _frame(self.record, self._store.trials(self.id))

    def resume(self, observer: Observer | None = None, *, trials: int | None = None) -> Study:
        """Go on with an interrupted study, to the end of its budget; with more `trials`, with a finished one too.

        Raises `BadInput` for no more trials than it has had.
        """
        from autoq.search.controller import run_study

        if trials is not None:
            from autoq.search.controller import raise_budget

            raise_budget(self._store, self.id, trials)
        run_study(self._store, self.id, observer)
        return self

    def refine(
        self,
        *,
        max: Limits | None = None,  # noqa: A002
        min: Limits | None = None,  # noqa: A002
        n: int = 1,
        best: str | None = None,
        observer: Observer | None = None,
    ) -> list[TrialRecord]:
        """Measure up to `n` assignments that the study's model offers for these limits, to be best in `best`
        (default: quality), as new trials of the study. Raises `BadInput` where it is not finished."""
        from autoq.search.refining import refine_study

        limits = bounds(self.record, max or {}, min or {})
        return refine_study(self._store, self.id, limits, n, observer, best=best)

    def recover(
        self,
        number: int,
        *,
        steps: int = 200,
        tokens: int | None = None,
        windows: int = 1,
        rate: float = 1.0,
        seed: int = 0,
        how: str = "model",
        observer: Observer | None = None,
    ) -> TrialRecord:
        """Train a trial towards the unquantized model's answers, at the same schemes and bytes, as a new trial.

        `steps` updates by `windows` windows of text each, on at most `tokens` of what is in no part of the study, at
        `rate` times the usual learning rates. `how` is "model", all layers together by the model's answers, or
        "blocks", each block by what it gives back: so many updates each. An interrupted training goes on when the same
        is called again. Raises `BadInput` where there is nothing to train or the study is not finished, `AutoQError`
        where nothing is gained.
        """
        from autoq.search.recovering import Training, recover_trial

        return recover_trial(self._store, self.id, number, Training(steps, tokens, windows, rate, seed, how), observer)

    def sequential(self, number: int, *, observer: Observer | None = None) -> TrialRecord:
        """Quantize a trial block after block, each layer for what it reads in the model quantized so far, at the same
        schemes and bytes, as a new trial.

        Raises `BadInput` where no layer is quantized or the study is not finished.
        """
        from autoq.search.sequencing import sequence_trial

        return sequence_trial(self._store, self.id, number, observer)

    def plot(self, figure: str, *, theme: str = "light", **options: object) -> go.Figure:
        """One of the dashboard's figures as a Plotly figure, in a `light` or `dark` theme.

        Raises `UnknownName` with the choices for a figure, an option, an objective or a theme that is not there, and
        `BadInput` for other values.
        """
        graph = _optional("plotly.graph_objects")
        view = importlib.import_module("autoq.dashboards.study_view")
        made = view.figure(self._store, self.id, figure, **options)
        return graph.Figure(made.themed(theme)).update_layout(title_text=made.title)

    def plot_frontier(self, x: str | None = None, y: str | None = None, **options: Any) -> go.Figure:
        """The frontier, the baselines and what they beat: size against quality unless told otherwise.

        Bars are one standard error. `options` and errors are those of `plot`.
        """
        return self.plot("frontier", x=x, y=y, **options)


def _optional(module: str) -> Any:
    """A module of the notebook extra. Raises `AutoQError` with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        raise AutoQError(f"{problem.name} is not installed: pip install 'autoq[notebook]'") from None


def _frame(study: StudyRecord, trials: Sequence[TrialRecord]) -> pd.DataFrame:
    pandas = _optional("pandas")
    rows = []
    for trial in trials:
        row: dict[str, Any] = {
            "number": trial.number,
            "state": trial.state,
            "origin": trial.origin,
            "baseline": trial.baseline,
            "feasible": trial.feasible,
            "on_frontier": trial.on_frontier,
            "hash": trial.hash,
        }
        best = trial.best_measurements()
        for name in measured_objectives(trials, study.objectives):
            found = best.get(name)
            row[name] = found.value if found else None
            row[f"{name}_stderr"] = found.stderr if found else None
            row[f"{name}_kind"] = found.kind if found else None
            row[f"{name}_part"] = found.part if found else None
        rows.append(row)
    frame: pd.DataFrame = pandas.DataFrame(rows)
    return frame.set_index("number") if rows else frame


def search(
    spec: str | Path | Mapping[str, Any] | StudySpec,
    *,
    db: str | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
) -> Study:
    """Run a study in this process and give it back.

    `spec` is a file, the name of a shipped spec, plain data or a `StudySpec`; `overrides` are
    `key.path=value` texts on a file or a name. `db` is a path or a SQLAlchemy URL. Progress is shown
    unless an `observer` is given. Raises `SpecError` before anything is loaded or written, and
    `AutoQError` where the study fails; what was measured until then is stored.
    """
    from autoq.display.progress import default_observer
    from autoq.search.controller import create_study, run_study

    wanted = _wanted(spec, overrides)
    store = Store.open(db or default_db())
    study = create_study(store, wanted)
    with contextlib.ExitStack() as stack:
        run_study(store, study.id, observer or stack.enter_context(default_observer(study.objectives)))
    return Study(store, study.id)


def _wanted(spec: str | Path | Mapping[str, Any] | StudySpec, overrides: Sequence[str]) -> StudySpec:
    from autoq import spec as specs

    if isinstance(spec, specs.StudySpec):
        return spec
    return specs.build_spec(spec) if isinstance(spec, Mapping) else specs.load_spec(spec, overrides)


def sensitivity(
    spec: str | Path | Mapping[str, Any] | StudySpec,
    *,
    db: str | None = None,
    overrides: Sequence[str] = (),
    observer: Observer | None = None,
) -> pd.DataFrame:
    """Predicted loss of each layer (row) under each scheme (column), without a search; NaN where it has no
    such choice. `frame.attrs` holds the model, the losses' unit and the predicted frontier.

    Arguments and errors as in `search`. What it finds is kept for later searches.
    """
    from autoq.display.progress import default_observer
    from autoq.search.survey import survey

    pandas = _optional("pandas")
    wanted = _wanted(spec, overrides)
    with Store.open(db or default_db()) as store, contextlib.ExitStack() as stack:
        found = survey(store, wanted, observer or stack.enter_context(default_observer())).to_json()
    frame: pd.DataFrame = pandas.DataFrame.from_dict(found["layers"], orient="index")
    frame.attrs |= {key: found[key] for key in ("model", "kind", "unit", "frontier")}
    return frame


def load_export(folder: str | Path, threads: int | None = None) -> tuple[Any, Any]:
    """The transformers model, on packed kernels, and the tokenizer (or image processor) of an export for torch-cpu.

    `threads` is what PyTorch computes on from now on (default: as it is). Raises `AutoQError` for a
    folder that holds no such export, and for one that is not whole.
    """
    from autoq.targets.torch_cpu import load

    return load(Path(folder), threads)


def open_study(name: str | int, *, db: str | None = None) -> Study:
    """The stored study of that name or id. Raises `NotFound` with the names that are near."""
    store = Store.open(db or default_db(), create=False)
    return Study(store, store.study(name).id)
