"""The report: frontier points and baselines on data that the search never saw, timed end to end.

Nothing is selected again by these values; they say what the selection is worth, as do the tables
`optimism` and `sampler_view` that are made from them.

A machine's speed drifts over minutes by more than it varies within a run. So a target times every point
in turns with the unquantized model, and what is stored is their ratio times the unquantized model's
latency in the study's table: all points of a study at one speed of the machine. Every point is timed in
`SWEEPS` sweeps over all points, every other one in reverse order. The value is the mean of the sweeps,
and how far they disagree is part of its standard error.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from autoq import trained
from autoq.measurement import Measurement
from autoq.objectives import QualityObjective
from autoq.search.executors import Executor, Job, completed
from autoq.search.observer import Observer
from autoq.search.optimism import optimism
from autoq.search.paging import each_trial
from autoq.search.sampler_view import ENDED, sampler_view
from autoq.search.setup import Problem
from autoq.store import Store, TrialRecord
from autoq.targets import UNQUANTIZED

SWEEPS = 2


def is_finite(measurement: Measurement) -> bool:
    """Whether value and standard error are finite numbers."""
    return math.isfinite(measurement.value) and (measurement.stderr is None or math.isfinite(measurement.stderr))


def report(
    problem: Problem,
    store: Store,
    study_id: int,
    executor: Executor,
    observer: Observer,
    also: Collection[int] = (),
) -> None:
    """Measure the study's frontier and baselines on the report part, and time them on the target.

    `also` are numbers of trials that are measured too, whether or not they are on the frontier. What a
    former run has measured is not measured again. A point that cannot be measured is noted and left with
    its search values.
    """
    points = _points(problem, store, study_id, also)
    sweeps = SWEEPS if problem.timed else 0
    metered = bool(problem.energies) and problem.target.runs_on is not None
    observer.stage("report", len(points) * (bool(problem.reported) + sweeps + metered))
    stage = _Stage(store, study_id, executor, observer)
    if problem.reported:
        stage.measure(points, problem.reported)
    for sweep in range(sweeps):
        stage.time(points if sweep % 2 == 0 else points[::-1], problem.timed, sweep)
    if metered:
        stage.meter(points, problem.energies, problem.spec.workers.device)
    _look_back(problem, store, study_id)


def _look_back(problem: Problem, store: Store, study_id: int) -> None:
    """Store what the study's own numbers say of its first quality objective."""
    name = next((name for name in problem.spec.objectives if name in problem.qualities), None)
    if name is None:
        return
    objective = problem.objectives[name]
    assert isinstance(objective, QualityObjective)
    if (found := optimism(store, study_id, name, objective)) is not None:
        store.put_table(study_id, "optimism", found)
    if (view := sampler_view(each_trial(store, study_id, ENDED), name)) is not None:
        store.put_table(study_id, "sampler_view", view.to_json())


def _points(problem: Problem, store: Store, study_id: int, also: Collection[int]) -> list[TrialRecord]:
    """Frontier points, at most `budget.report_points` of them, all baselines, and those of `also`: where it is
    given, no others than have been measured already.

    Baselines do not count: on the frontier or not they are measured, and would leave few places to what was found.
    """
    frontier = [trial for trial in store.frontier(study_id) if trial.baseline is None]
    limit = problem.spec.budget.report_points
    if also:
        frontier = [trial for trial in frontier if any(part == "report" for _, part in trial.measurements)]
    elif limit is not None and len(frontier) > limit:
        # Evenly along the first objective: the ends and what lies between.
        frontier.sort(key=lambda trial: trial.values(problem.spec.objectives))
        kept = {round(i * (len(frontier) - 1) / max(limit - 1, 1)) for i in range(limit)}
        frontier = [frontier[i] for i in sorted(kept)]
    numbers = {trial.number for trial in frontier} | set(also)
    complete = each_trial(store, study_id, ["complete"])
    chosen = [trial.number for trial in complete if trial.number in numbers or trial.baseline]
    return [store.trial(study_id, number) for number in chosen]


def at_table_speed(measured: Measurement, costs: Mapping[str, Any] | None) -> Measurement:
    """A latency as it would be at the machine's speed when the study's table was timed.

    `costs` is the stored table. What the clock said stays in the detail as `clock_ms`. A measurement
    without the unquantized model beside it is given back as it is.
    """
    reference = ((costs or {}).get("detail", {}).get(UNQUANTIZED) or {}).get(measured.objective)
    beside = measured.detail.get(UNQUANTIZED)
    if not reference or not beside:
        return measured
    speed = reference / beside
    detail = {**measured.detail, UNQUANTIZED: reference, "clock_ms": measured.value}
    stderr = None if measured.stderr is None else measured.stderr * speed
    return dataclasses.replace(measured, value=measured.value * speed, stderr=stderr, detail=detail)


def combined(sweeps: Sequence[float], latest: Measurement) -> Measurement:
    """One latency from the values of its sweeps, the last of which is `latest`.

    The standard error joins that of the runs within a sweep and that of the mean over sweeps.
    """
    value = statistics.fmean(sweeps)
    within = (latest.stderr or 0.0) / math.sqrt(len(sweeps))
    between = statistics.stdev(sweeps) / math.sqrt(len(sweeps)) if len(sweeps) > 1 else 0.0
    detail = {**latest.detail, "sweeps": list(sweeps)}
    return dataclasses.replace(latest, value=value, stderr=math.hypot(within, between), detail=detail)


def _beside_prediction(measured: Measurement, trial: TrialRecord) -> Measurement:
    """A latency with what the study's table had predicted for it in its detail."""
    predicted = trial.measurements.get((measured.objective, "search"))
    if predicted is None or predicted.kind != "predicted":
        return measured
    return dataclasses.replace(measured, detail={**measured.detail, "predicted_ms": predicted.value})


class _Stage:
    """Runs the report's jobs and stores what comes back."""

    def __init__(self, store: Store, study_id: int, executor: Executor, observer: Observer) -> None:
        self.store, self.study_id = store, study_id
        self.executor, self.observer = executor, observer
        self.costs: Mapping[str, Any] | None = store.table(study_id, "costs")

    def measure(self, points: Sequence[TrialRecord], objectives: Sequence[str]) -> None:
        """Quality of `points` on the report part."""
        jobs = {}
        for trial in points:
            if all((name, "report") in trial.measurements for name in objectives):
                self.observer.advance()
            else:
                job = Job(f"report-{trial.number}", "measure", {"assignment": trial.assignment, "part": "report"})
                jobs[job.key] = (job, trial)
        self._run(jobs)

    def time(self, points: Sequence[TrialRecord], objectives: Sequence[str], sweep: int) -> None:
        """One sweep of timings, one assignment at a time."""
        jobs = {}
        for trial in points:
            stored = self.store.trial(self.study_id, trial.number).measurements
            past = [stored[name, "report"] for name in objectives if (name, "report") in stored]
            if len(past) == len(objectives) and all(len(m.detail.get("sweeps", ())) > sweep for m in past):
                self.observer.advance()
            else:
                arguments = {"assignment": trial.assignment}
                job = Job(f"time-{trial.number}-{sweep}", "time", arguments, exclusive=True, device=self._device())
                jobs[job.key] = (job, trial)
        self._run(jobs)

    def meter(self, points: Sequence[TrialRecord], objectives: Sequence[str], wanted: str | None) -> None:
        """Energy of `points`, one assignment at a time, where the workers' machine has meters.

        All of it on one device: the table's, or else the one that the first was metered on, of those that have
        `wanted` in their names.
        """
        for trial in points:
            if all((name, "report") in trial.measurements for name in objectives):
                self.observer.advance()
                continue
            device = self._device() or self._metered(points, objectives) or wanted
            arguments = {"assignment": trial.assignment}
            job = Job(f"meter-{trial.number}", "meter", arguments, exclusive=True, device=device)
            self._run({job.key: (job, trial)})

    def _device(self) -> str | None:
        """The device of the study's table of latencies."""
        return (self.costs or {}).get("device")

    def _metered(self, points: Sequence[TrialRecord], objectives: Sequence[str]) -> str | None:
        for trial in points:
            stored = self.store.trial(self.study_id, trial.number).measurements
            for name in objectives:
                if (found := stored.get((name, "report"))) is not None and found.device:
                    return found.device
        return None

    def _run(self, jobs: Mapping[str, tuple[Job, TrialRecord]]) -> None:
        for _, trial in jobs.values():
            assert trial.assignment is not None
            trained.place(trial.assignment, self.store.trained_layers)
        for result in completed(self.executor, [job for job, _ in jobs.values()]):
            job, trial = result.job, jobs[result.job.key][1]
            if result.failure is not None:
                self._note(trial, f"{job.action} for the report failed: {result.failure.message}")
            elif not all(map(is_finite, result.value)):
                self._note(trial, f"{job.action} for the report is not finite")
            elif result.value:  # a machine without meters has nothing to say
                self._store(trial, job.action, result.value)
            self.observer.advance()

    def _note(self, trial: TrialRecord, text: str) -> None:
        self.observer.note(f"trial {trial.number}: {text}")

    def _foreign(self, measurements: Sequence[Measurement]) -> str | None:
        """Another device than the table's: latencies of two machines never meet on one frontier."""
        own = self._device()
        return next((m.device for m in measurements if own and m.device and m.device != own), None)

    def _store(self, trial: TrialRecord, action: str, measurements: Sequence[Measurement]) -> None:
        if action == "time" and (foreign := self._foreign(measurements)) is not None:
            self._note(trial, f"timed on {foreign}, not on the device of the study's table; its prediction stays")
            return
        if action == "time":
            stored = self.store.trial(self.study_id, trial.number).measurements
            past = {name: m.detail.get("sweeps", []) for (name, part), m in stored.items() if part == "report"}
            steady = [at_table_speed(m, self.costs) for m in measurements]
            measurements = [
                _beside_prediction(combined([*past.get(m.objective, []), m.value], m), trial) for m in steady
            ]
        self.store.add_measurements(trial.id, measurements)
        self.observer.reported(self.store.trial(self.study_id, trial.number))
