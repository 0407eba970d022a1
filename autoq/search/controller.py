"""The controller: ask, dispatch, store, tell. The only writer of trials.

Proposals come from the plan (baselines, seeds), then from the sampler. `workers.count` trials are out
at a time. Results are stored as they come and told to the sampler in the order of trial numbers, and
trial n is asked for when trial n − count has been told and no later one; so the proposals depend on the
spec and its seed alone, not on which worker was faster, not on the executor, and not on interruptions.
Neither does whom a proposal is held against while it is evaluated, and so when it is given up: a trial
of those that had been told when it was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoq import plugins, trained
from autoq.assignment import Assignment
from autoq.errors import AutoQError, LeaseLost, NotFinite, StoreAway
from autoq.measurement import Measurement
from autoq.objectives import can_be_compared, computed
from autoq.search.executors import MAX_ATTEMPTS, Executor, Failure, Job, Result, make_executor
from autoq.search.holding import LOOK_SECONDS, Hold, StopRequested, Watching, holding
from autoq.search.observer import Observer
from autoq.search.optuna_study import AskTell, Row, State
from autoq.search.priors import make_prior
from autoq.search.reporting import is_finite, report
from autoq.search.samplers import SLOPES, Sampler
from autoq.search.setup import Problem, Proposal, create_study, make_plan, pose
from autoq.search.stages import run_job
from autoq.search.stopping import Finished, choose, expected, was_stopped
from autoq.spec import Bound, StudySpec
from autoq.statistics import Rival
from autoq.store import Store, StudyRecord, TrialRecord
from autoq.store.queue_records import CLOCK, CRASHES
from autoq.store.records import Origin
from autoq.targets import CostTable

__all__ = ["create_study", "raise_budget", "run_study"]

MAX_KILLED = 3  # dispatches that ended with the whole process; more than chance, less than patience
CANCEL_SECONDS = 60.0  # for which a cancelled study waits for the trials that are out
MAX_REPEATS = 200  # consecutive duplicates after which a sampler is taken to have nothing new


def run_study(
    store: Store,
    study_id: int,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = make_executor,
    hold: Hold | None = None,
) -> StudyRecord:
    """Run a study to the end of its budget, or go on with one that was interrupted.

    Every trial is stored before the observer hears of it. On Ctrl-C the study is left `interrupted`
    and `KeyboardInterrupt` goes on; on an error it is left `failed` with the reason and `AutoQError`
    goes on. A study that is asked to is left `cancelled`, or `queued` where another one is to run first, once the
    trials that are out have ended. In any case nothing that finished is lost and the study can be resumed.

    Raises `StudyBusy` where another process runs it, and `LeaseLost` where one has taken it over, which then finds
    everything as it was stored.
    """
    observer = observer or Observer()
    with holding(store, study_id, hold) as hold:
        store = hold.store
        study = store.study(study_id)
        try:
            store.set_state(study_id, "running")
            watching = Watching(observer, hold)
            spec = study.study_spec()
            watching.stage("load", 1)  # importing and starting workers may take longer than all that follows
            problem = pose(spec)
            with make(spec) as executor:
                hold.executor = executor
                _Run(store, study, problem, executor, watching, hold).run()
            store.queue.settle(study_id, "finished")
        except StopRequested as stop:
            store.queue.settle(study_id, hold.state_after(stop, "cancelled"))
        except KeyboardInterrupt as interrupt:
            with contextlib.suppress(StoreAway):  # it was waited for, and now it is not
                state = hold.state_after(interrupt, "interrupted")
                store.queue.settle(study_id, state, "interrupted by the user" if state == "interrupted" else None)
            raise
        except LeaseLost:
            raise
        except AutoQError as problem_met:
            _leave_failed(store, study_id, str(problem_met))
            raise
        except Exception as bug:
            _leave_failed(store, study_id, f"{type(bug).__name__}: {bug}")
            raise
        finally:
            hold.executor = None
        return store.study(study_id)


def raise_budget(store: Store, study_id: int, trials: int) -> None:
    """Let a study have `trials` trials, more than it has had, so that `run_study` goes on with it.

    A new budget has all of its wall time before it. Raises `BadInput` for fewer, `SpecError` for what is no budget;
    then nothing has changed.
    """
    store.queue.raise_budget(study_id, trials)


def _leave_failed(store: Store, study_id: int, reason: str) -> None:
    """Note the reason, unless the database itself is what failed."""
    try:
        store.queue.settle(study_id, "failed", reason)
    except AutoQError:
        return


def violations(constraints: Mapping[str, Bound], measurements: Sequence[Measurement]) -> dict[str, float]:
    """How far each bound is overstepped, relative to the bound; at most 0 where it is kept."""
    values = {m.objective: expected(m) for m in measurements if m.part == "search"}
    found = {}
    for name, bound in constraints.items():
        if bound.max is not None:
            found[f"{name}.max"] = (values[name] - bound.max) / (abs(bound.max) or 1.0)
        if bound.min is not None:
            found[f"{name}.min"] = (bound.min - values[name]) / (abs(bound.min) or 1.0)
    return found


@dataclass
class _Outcome:
    """What the sampler is told of a trial: the values that it steers by, or None if it failed.

    `beats` says whether it was evaluated in full and is feasible, so that others may be held against it.
    """

    values: list[float] | None
    violations: list[float] = field(default_factory=list)
    beats: bool = False


class _Run:
    """One run of `run_study`: the state of the loop."""

    def __init__(
        self,
        store: Store,
        study: StudyRecord,
        problem: Problem,
        executor: Executor,
        observer: Observer,
        hold: Hold,
    ) -> None:
        self.store, self.study, self.problem = store, study, problem
        self.executor, self.observer, self.hold = executor, observer, hold
        self.spec: StudySpec = problem.spec
        # Of the budget's wall time only what the study ran counts, over all of its runs.
        self.ran = float((store.table(study.id, CLOCK) or {}).get("seconds", 0.0))
        self.started = time.monotonic()
        self.plan: list[Proposal] = []
        self.costs: CostTable | None = None
        self.asktell: AskTell
        self.asked = 0  # trials with a number, the next number
        self.told = 0  # trials told to the sampler, in order
        self.done = 0  # trials that count against the budget
        # What is known and not told yet; a number stands for "as that trial came out".
        self.outcomes: dict[int, _Outcome | int] = {}
        self.told_outcomes: dict[int, _Outcome] = {}
        self.flying: dict[str, TrialRecord] = {}
        self.by_hash: dict[str, int] = {}
        # A baseline outside of the space is a trial that the sampler never hears of, so it counts its own.
        self.sampler_numbers: dict[int, int] = {}
        self.study_attrs: Mapping[str, Any] = study.sampler_attrs

    def run(self) -> None:
        """All stages of the study."""
        facts = run_job(self.executor, Job("describe", "describe")).value
        self.observer.advance()
        variables = self.problem.space.variables
        self.observer.study(
            self.study.name,
            facts
            | {
                "model": self.spec.model.id,
                "layers": len(self.problem.info.layers),
                "searched": len(self.problem.space.layers),
                "variables": len(variables),
                "choices": max(len(v.choices) for v in variables),
                "sampler": self.spec.sampler.name,
                "trials": self.spec.budget.trials,
            },
        )
        device = f"{facts['device']}, {facts['threads']} threads"
        self.plan, self.costs = make_plan(self.problem, self.store, self.study.id, self.executor, self.observer, device)
        try:
            self._restore()
            self._search()
        finally:
            self._keep_time()
        self._refuse_nothing()
        report(self.problem, self.store, self.study.id, self.executor, self.observer)

    # -- search -----------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Rebuild the sampler from the stored trials and dispatch again what was running."""
        self.asktell = AskTell(
            [(v.name, len(v.choices)) for v in self.problem.space.variables],
            [self.problem.objectives[name].direction for name in self.problem.steering],
            self.spec.sampler.name,
            self.spec.sampler.seed,
            dict(self.spec.sampler.options),
            n_startup=sum(self.problem.space.indices(p.assignment) is not None for p in self.plan),
            n_constraints=sum((b.min is not None) + (b.max is not None) for b in self.spec.constraints.values()),
            prior=make_prior(self.problem, self.store.table(self.study.id, "sensitivity"), self.costs),
        )
        trials = self.store.trials(self.study.id, with_assignments=True)
        running = []
        for trial in trials:
            assert trial.number == self.asked, "trial numbers have a gap"
            self.asked += 1
            assert trial.assignment is not None
            if trial.state == "duplicate":
                assert trial.duplicate_of is not None
                self.outcomes[trial.number] = trial.duplicate_of
                continue
            self.by_hash[trial.hash] = trial.number
            if trial.state == "running":
                running.append(trial)
            else:
                self.done += trial.parent is None
                self.outcomes[trial.number] = self._outcome(trial)
        # What the sampler had been told of when it was asked last.
        while self._waits() and self._settle() is not None:
            pass
        rows = []
        for trial in trials:
            assert trial.assignment is not None
            indices = self.problem.space.indices(trial.assignment)
            if indices is None or trial.parent is not None:
                continue
            told = self.told_outcomes.get(trial.number)
            state: State = "running" if told is None else "failed" if told.values is None else "complete"
            number = self.sampler_numbers[trial.number] = len(self.sampler_numbers)
            values, excess = (told.values, told.violations) if told else (None, [])
            rows.append(Row(number, indices, state, values, excess, dict(trial.sampler_attrs)))
        self.asktell.restore(rows, self.study.sampler_attrs)
        for trial in running:
            assert trial.assignment is not None
            self._take_up(trial, trial.assignment)

    def _take_up(self, trial: TrialRecord, assignment: Assignment) -> None:
        """Dispatch a trial again that was running when the study ended, unless it is what ended it.

        A candidate that takes this whole process down leaves no failure behind, only a study that is
        still `running`, or that a queue has noted the crash of. It would do so at every resume.
        """
        crashed = self.study.state == "running" or self.store.table(self.study.id, CRASHES) is not None
        if crashed and trial.attempt >= MAX_KILLED:
            reason = f"quarantined: the study's process ended {trial.attempt} times while it ran"
            self.store.fail_trial(trial.id, trial.attempt, "WorkerLost", reason, "", 0.0, "")
            self.observer.note(f"trial {trial.number}: {reason}")
            self.done += trial.parent is None
            self.outcomes[trial.number] = _Outcome(None)
        else:
            trained.place(assignment, self.store.trained_layers)
            self._dispatch(trial, assignment, self.store.retry_trial(trial.id))

    def _search(self) -> None:
        self.observer.stage("search", self.spec.budget.trials)
        self.observer.advance(self.done)
        repeats = 0
        exhausted = False
        while True:
            while not exhausted and self._may_ask():
                fresh = self._propose()
                if fresh is None:
                    exhausted = True
                    self.observer.note("every assignment of the space has been tried")
                    break
                repeats = 0 if fresh else repeats + 1
                if repeats >= MAX_REPEATS:
                    exhausted = True
                    self.observer.note(f"the sampler proposed nothing new {MAX_REPEATS} times in a row; stopping")
            if not self.flying:
                self.hold.watch()
                if not exhausted and self.done < self.spec.budget.trials:
                    self.observer.note(f"the wall time is over after {self.done} of {self.spec.budget.trials} trials")
                return
            self._receive(self._next())

    def _next(self) -> Result:
        """The next trial's result. A study that is cancelled waits for it only so long."""
        until = None
        while True:
            asked_at = time.monotonic()
            result = self.executor.next(LOOK_SECONDS)
            if result is not None:
                return result
            if time.monotonic() - asked_at < LOOK_SECONDS / 2:
                raise AutoQError("the workers stopped while trials were running")
            if self.hold.asked() == "cancel":
                until = until or time.monotonic() + CANCEL_SECONDS
                if time.monotonic() > until:
                    raise StopRequested("cancel")

    def _keep_time(self) -> None:
        """Store for how long the study has run, where that is limited."""
        if self.spec.budget.wall_time is not None:
            self.store.put_table(self.study.id, CLOCK, {"seconds": self._elapsed()})

    def _elapsed(self) -> float:
        return self.ran + time.monotonic() - self.started

    def _refuse_nothing(self) -> None:
        """A study in which every trial failed has failed, for what is most likely one reason."""
        failed = self.store.trials(self.study.id, states=["failed"], limit=1)
        if failed and failed[0].error is not None and not self.store.trials(self.study.id, ["complete"], limit=1):
            error = failed[0].error
            raise AutoQError(f"all {self.done} trials failed, the first with {error.type}: {error.message}")

    def _may_ask(self) -> bool:
        budget = self.spec.budget
        if self.done + len(self.flying) >= budget.trials:
            return False
        if budget.wall_time is not None and self._elapsed() >= budget.wall_time:
            return False
        if self.hold.stops() is not None:
            return False
        self._tell()
        return not self._waits()

    def _waits(self) -> bool:
        """Whether the next proposal waits for another outcome to be told."""
        return self.asked - self.told >= self.spec.workers.count

    def _propose(self) -> bool | None:
        """Take the next proposal: True if it is new, False if it repeats a trial, None if none is left."""
        number, known_as = self.asked, len(self.sampler_numbers)
        if number < len(self.plan):
            proposal = self.plan[number]
            assignment, baseline = proposal.assignment, proposal.baseline
            origin: Origin = "baseline" if baseline else "seed"
            indices = self.problem.space.indices(assignment)
            if indices is not None:
                self.asktell.ask_fixed(known_as, indices)
        else:
            indices = self.asktell.ask(known_as)
            if indices is None:
                return None
            assignment, baseline, origin = self.problem.space.assignment(indices), None, "sampler"
        attrs = {}
        if indices is not None:
            attrs = self.asktell.attrs(known_as)
            self.sampler_numbers[number] = known_as
        if (study_attrs := self.asktell.study_attrs()) != self.study_attrs:
            self.store.save_sampler_attrs(self.study.id, study_attrs)
            self.study_attrs = study_attrs
        self.asked += 1
        if (original := self.by_hash.get(assignment.hash)) is not None:
            trial = self.store.record_duplicate(self.study.id, number, assignment, original, attrs, origin)
            self.outcomes[number] = original
            self.observer.trial(trial, self.done, self.spec.budget.trials)
            return False
        self.by_hash[assignment.hash] = number
        trial = self.store.start_trial(self.study.id, number, assignment, origin, baseline, attrs)
        self._dispatch(trial, assignment, trial.attempt)
        return True

    def _dispatch(self, trial: TrialRecord, assignment: Assignment, attempt: int) -> None:
        key = f"trial-{trial.number}"
        self.flying[key] = dataclasses.replace(trial, attempt=attempt)
        arguments: dict[str, Any] = {"assignment": assignment, "part": "search"}
        action = "measure"
        if self._wants_slopes(trial):
            action = "measure_with_slopes"
            variables = self.problem.space.variables
            arguments["choices"] = {part.name: [str(s) for s in v.choices] for v in variables for part in v.members}
            arguments["turn"] = trial.number
        elif trial.origin == "sampler" and (rival := self._rival(trial.number, assignment)) is not None:
            arguments["rival"] = rival
        self.executor.submit(Job(key, action, arguments, attempt, limit_seconds=self.spec.budget.trial_time))

    def _wants_slopes(self, trial: TrialRecord) -> bool:
        """Whether it is one of the sampler's first: seeds, then its own proposals."""
        sampler = plugins.load("search.samplers", self.spec.sampler.name, Sampler)
        before = sum(proposal.baseline is not None for proposal in self.plan)
        mine = trial.baseline is None and trial.number in self.sampler_numbers
        return mine and bool(self.problem.qualities) and trial.number - before < sampler.slopes

    def _learn(self, trial: TrialRecord, slopes: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the trial is to remember of its slopes, per parameter of the space; None if there is nothing new."""
        if not slopes:
            return None
        own = {v.name: [slopes["table"][part.name] for part in v.members] for v in self.problem.space.variables}
        table = {name: [float(f"{sum(parts):.6g}") for parts in zip(*rows, strict=True)] for name, rows in own.items()}
        found = {SLOPES: {"loss": slopes["loss"], "table": table}}
        self.asktell.learn(self.sampler_numbers[trial.number], found)
        return {**trial.sampler_attrs, **found}

    def _rival(self, number: int, assignment: Assignment) -> Rival | None:
        """Whom trial `number` is held against: a trial that was told before it was asked for."""
        spec, problem = self.spec, self.problem
        if spec.budget.stop_confidence is None:
            return None
        told = ((n, self.told_outcomes[n]) for n in range(max(0, number - spec.workers.count + 1)))
        finished = [Finished(n, outcome.values) for n, outcome in told if outcome.beats and outcome.values is not None]
        directions = [problem.objectives[name].direction for name in spec.objectives]
        known = {m.objective: m.value for m in self._computed(assignment)}
        chosen = choose(finished, spec.objectives, directions, problem.qualities, known)
        if chosen is None:
            return None
        # What only bounds what is feasible is left out: who beats whom is a matter of the objectives.
        compared = [name for name in problem.qualities if name in spec.objectives]
        if not can_be_compared([problem.objectives[name] for name in compared]):
            return None
        values = {}
        for name in compared:
            found = self.store.token_values(self.study.id, chosen, name, "search")
            if found is None:
                return None
            values[name] = found
        return Rival(chosen, values, spec.budget.stop_confidence)

    def _receive(self, result: Result) -> None:
        trial = self.flying.get(result.job.key)
        if trial is None or trial.attempt != result.job.attempt:  # of a worker that was thought dead, or sent twice
            self.observer.note(f"{result.job.key}: a late result was dropped")
            return
        assignment: Assignment = result.job.arguments["assignment"]
        failure = result.failure
        if failure is not None and failure.crashed and result.job.attempt < MAX_ATTEMPTS:
            self.observer.note(f"trial {trial.number}: the worker died; trying once more")
            self._dispatch(trial, assignment, self.store.retry_trial(trial.id))
            return
        self.hold.patience.keeps = f"the result of trial {trial.number}"
        del self.flying[result.job.key]
        measurements: list[Measurement] = []
        attrs = None
        if failure is None:
            quality, slopes = result.value if result.job.action == "measure_with_slopes" else (result.value, {})
            attrs = self._learn(trial, slopes)
            measurements = self._complete(quality, assignment)
            if bad := next((m for m in measurements if not is_finite(m)), None):
                failure = Failure.of(NotFinite(f"{bad.objective} is {bad.value} under this assignment"))
        if failure is not None:
            accepted = self._store_failure(trial, result, failure)
        else:
            excess = violations(self.spec.constraints, measurements)
            told = (trial.id, result.job.attempt, measurements, excess, result.seconds, result.worker)
            stopped = was_stopped(measurements)
            accepted = self.store.stop_trial(*told) if stopped else self.store.finish_trial(*told, attrs)
        if not accepted:  # somebody else finished this attempt; what is stored is what counts
            self.observer.note(f"trial {trial.number}: a late result was dropped")
        self.done += trial.parent is None
        stored = self.store.trial(self.study.id, trial.number)
        self.hold.patience.keeps = ""
        self.outcomes[trial.number] = self._outcome(stored)
        self._keep_time()
        self.observer.trial(stored, self.done, self.spec.budget.trials)

    def _complete(self, quality: Sequence[Measurement], assignment: Assignment) -> list[Measurement]:
        by_name = {m.objective: m for m in [*quality, *self._computed(assignment)]}
        return [by_name[name] for name in self.spec.measured]

    def _computed(self, assignment: Assignment) -> list[Measurement]:
        problem = self.problem
        return computed(problem.objectives, problem.info, assignment, self.costs, self.spec.target, problem.target)

    def _store_failure(self, trial: TrialRecord, result: Result, failure: Failure) -> bool:
        message = failure.message
        if failure.crashed:
            message = f"quarantined after {result.job.attempt} crashes: {message}"
        return self.store.fail_trial(
            trial.id, result.job.attempt, failure.error, message, failure.traceback, result.seconds, result.worker
        )

    def _outcome(self, trial: TrialRecord) -> _Outcome:
        # What was trained was not proposed: its schemes are those of another trial, which the sampler has learned from.
        if trial.state not in ("complete", "stopped") or trial.parent is not None:
            return _Outcome(None)
        values = [expected(trial.measurements[name, "search"]) for name in self.problem.steering]
        return _Outcome(values, [trial.violations[k] for k in sorted(trial.violations)], bool(trial.feasible))

    def _settle(self) -> int | None:
        """Take the outcome that is next in order, if it is known, and return its trial's number."""
        if (found := self.outcomes.pop(self.told, None)) is None:
            return None
        # A duplicate repeats an earlier number, which has been settled already.
        self.told_outcomes[self.told] = self.told_outcomes[found] if isinstance(found, int) else found
        self.told += 1
        return self.told - 1

    def _tell(self) -> None:
        """Tell the sampler, in order, of the outcomes that the next proposal waits for, as far as they are known."""
        while self._waits() and (number := self._settle()) is not None:
            if (known_as := self.sampler_numbers.get(number)) is not None:
                outcome = self.told_outcomes[number]
                self.asktell.tell(known_as, outcome.values, outcome.violations)
