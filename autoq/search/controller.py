"""The controller: ask, dispatch, store, tell. The only writer of trials.

Proposals come from the plan (baselines, seeds), then from the sampler. `workers.count` trials are out
at a time. Results are stored as they come, those that are there by then in one transaction. They are told to
the sampler in the order of trial numbers, and trial n is asked for when trial n − window (`autoq.search.ahead`)
has been told and no later one; so the proposals depend on the spec and its seed alone, not on which worker was
faster, not on the executor, and not on interruptions.
Neither does whom a proposal is held against while it is evaluated, and so when it is given up: a trial
of those that had been told when it was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoq import plugins, trained
from autoq.assignment import Assignment
from autoq.errors import AutoQError, LeaseLost, NotFinite, StoreAway
from autoq.measurement import Measurement
from autoq.objectives import computed
from autoq.search.ahead import Pace, window
from autoq.search.executors import MAX_ATTEMPTS, Executor, Failure, Job, Result, make_executor
from autoq.search.holding import LOOK_SECONDS, Hold, StopRequested, Watching, holding
from autoq.search.observer import Observer
from autoq.search.optuna_study import AskTell, Row, State
from autoq.search.outcomes import Flight, Outcome, ending_of, keep, leave_failed, outcome_of, refuse_nothing, summed
from autoq.search.priors import make_prior
from autoq.search.reporting import is_finite, report
from autoq.search.rivals import Rivals
from autoq.search.samplers import SLOPES, Sampler
from autoq.search.setup import Problem, Proposal, create_study, make_plan, pose
from autoq.search.stages import run_job
from autoq.spec import StudySpec
from autoq.store import Ending, NewTrial, Origin, Store, StudyRecord, TrialRecord
from autoq.store.queue_records import CLOCK, CRASHES, LOADING
from autoq.targets import CostTable

__all__ = ["create_study", "raise_budget", "run_study"]

MAX_KILLED = 3  # dispatches that ended with the whole process; more than chance, less than patience
CANCEL_SECONDS = 60.0  # for which a cancelled study waits for the trials that are out
GROUP = 64  # results, or new trials, that are stored at once: nobody else is heard meanwhile
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
            leave_failed(store, study_id, str(problem_met))
            raise
        except Exception as bug:
            leave_failed(store, study_id, f"{type(bug).__name__}: {bug}")
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
        self.outcomes: dict[int, Outcome | int] = {}
        self.told_outcomes: dict[int, Outcome] = {}
        self.window = window(self.spec.workers.count)
        self.ahead: deque[NewTrial] = deque()  # asked for and not stored yet
        self.pace = Pace(self.spec.workers.count)
        self.late: set[int] = set()  # passed over, and not told yet
        self.until: float | None = None  # when a cancelled study stops waiting
        self.repeats = 0  # proposals in a row that were there before
        self.exhausted = False
        self.flying: dict[str, Flight] = {}
        self.rivals = Rivals(problem, store, study.id)
        self.by_hash: dict[str, int] = {}
        # A baseline outside of the space is a trial that the sampler never hears of, so it counts its own.
        self.sampler_numbers: dict[int, int] = {}
        self.study_attrs: Mapping[str, Any] = study.sampler_attrs

    def run(self) -> None:
        """All stages of the study."""
        facts = run_job(self.executor, Job("describe", "describe", device=self._device())).value
        if self.hold.queued:  # turns are dealt out by it
            self.store.put_table(self.study.id, LOADING, {"seconds": self.executor.loading_seconds})
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
        self.plan, self.costs = make_plan(self.problem, self.store, self.study.id, self.executor, self.observer, facts)
        try:
            self._restore()
            self._search()
        finally:
            self._keep_time()
        refuse_nothing(self.store, self.study.id, self.done)
        report(self.problem, self.store, self.study.id, self.executor, self.observer)

    def _device(self) -> str | None:
        """Whose worker is asked to describe itself: the one that is to be timed, where nothing is timed yet."""
        timed = self.problem.timed or self.problem.energies
        return self.spec.workers.device if timed and self.store.table(self.study.id, "costs") is None else None

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
                self.outcomes[trial.number] = outcome_of(trial, self.problem.steering)
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
            self.outcomes[trial.number] = Outcome(None)
        else:
            trained.place(assignment, self.store.trained_layers)
            self._dispatch(trial, assignment, self.store.retry_trial(trial.id))

    def _search(self) -> None:
        self.observer.stage("search", self.spec.budget.trials)
        self.observer.advance(self.done)
        while True:
            self._start()  # whoever is free comes first
            if not self.flying:
                self.hold.watch()
                if not self.exhausted and self.done < self.spec.budget.trials:
                    self.observer.note(f"the wall time is over after {self.done} of {self.spec.budget.trials} trials")
                return
            self._hear()

    def _hear(self) -> None:
        """Take what has come, a group at most; if nothing has, make a proposal, or wait for what comes soon."""
        result, workers = self.executor.ready(), self.spec.workers.count
        if result is None:
            if workers > 1 and len(self.ahead) < workers and self._may_start() and self._ask(len(self.ahead) + 1):
                return
            result = self._next()
        found = []
        try:
            while result is not None:
                found.append(result)
                result = self.executor.ready() if len(found) < GROUP else None
        finally:
            self._receive(found)  # whatever else the executor says

    def _next(self) -> Result | None:
        """The next trial's result, if it comes soon. A study that is cancelled waits for all only so long."""
        asked_at = self.executor.clock()
        result = self.executor.next(LOOK_SECONDS)
        if result is None:
            if self.executor.clock() - asked_at < LOOK_SECONDS / 2:
                raise AutoQError("the workers stopped while trials were running")
            if self.hold.asked() == "cancel":
                self.until = self.until or time.monotonic() + CANCEL_SECONDS
                if time.monotonic() > self.until:
                    raise StopRequested("cancel")
        return result

    def _keep_time(self) -> None:
        """Store for how long the study has run, where that is limited."""
        if self.spec.budget.wall_time is not None:
            self.store.put_table(self.study.id, CLOCK, {"seconds": self._elapsed()})

    def _elapsed(self) -> float:
        return self.ran + time.monotonic() - self.started

    def _may_start(self) -> bool:
        """Whether new trials may begin, as far as time and what is asked of the study go."""
        limit = self.spec.budget.wall_time
        return (limit is None or self._elapsed() < limit) and self.hold.stops() is None

    def _ask(self, wanted: int) -> bool:
        """Have so many proposals in `ahead`, one more than there are at most; False where it is not to be had now."""
        if len(self.ahead) >= wanted:
            return True
        counted = sum(new.repeats is None for new in self.ahead)
        if self.exhausted or self.done + len(self.flying) + counted >= self.spec.budget.trials:
            return False
        self._tell()
        if self._waits():
            return False
        new = self._propose()
        if new is None:
            self.exhausted = True
            self.observer.note("every assignment of the space has been tried")
            return False
        self.ahead.append(new)
        self.repeats = self.repeats + 1 if new.repeats is not None else 0
        if self.repeats >= MAX_REPEATS:
            self.exhausted = True
            self.observer.note(f"the sampler proposed nothing new {MAX_REPEATS} times in a row; stopping")
        return True

    def _waits(self) -> bool:
        """Whether the next proposal waits for another outcome to be told."""
        return self.asked - self.told >= self.window

    def _propose(self) -> NewTrial | None:
        """Take the next proposal; None if none is left."""
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
        study_attrs: Mapping[str, Any] | None = self.asktell.study_attrs()
        if study_attrs == self.study_attrs:
            study_attrs = None
        else:
            self.study_attrs = dict(study_attrs or {})
        self.asked += 1
        original = self.by_hash.setdefault(assignment.hash, number)
        if original != number:
            self.outcomes[number] = original
        repeats = None if original == number else original
        return NewTrial(number, assignment, origin, baseline, attrs, study_attrs, repeats)

    def _start(self) -> None:
        """Store the next trials, as many as there are free workers, and dispatch those that repeat no other one."""
        while True:
            new: list[NewTrial] = []
            free = self.spec.workers.count - len(self.flying)
            while free and len(new) < GROUP and self._may_start() and self._ask(len(new) + 1):
                new.append(self.ahead[len(new)])
                free -= new[-1].repeats is None
            if not new:
                return
            for trial in self.store.start_trials(self.study.id, new):
                self.ahead.popleft()
                assert trial.assignment is not None
                if trial.state == "duplicate":
                    self.observer.trial(trial, self.done, self.spec.budget.trials)
                else:
                    self._dispatch(trial, trial.assignment, trial.attempt)

    def _dispatch(self, trial: TrialRecord, assignment: Assignment, attempt: int) -> None:
        key = f"trial-{trial.number}"
        flight = self.flying.get(key)
        if flight is None:
            flight = self.flying[key] = Flight(trial, self._computed(assignment), self.executor.clock())
            if trial.origin == "sampler" and not self._wants_slopes(trial):
                flight.rival = self._rival(trial.number, flight.computed)
        flight.trial = dataclasses.replace(trial, attempt=attempt)
        arguments: dict[str, Any] = {"assignment": assignment, "part": "search"}
        action = "measure"
        if self._wants_slopes(trial):
            action = "measure_with_slopes"
            variables = self.problem.space.variables
            arguments["choices"] = {part.name: [str(s) for s in v.choices] for v in variables for part in v.members}
            arguments["turn"] = trial.number
        elif (rival := self.rivals.rival(flight.rival)) is not None:
            arguments["rival"] = rival
        seconds, memory = self.spec.budget.trial_time, self.spec.budget.trial_memory
        self.executor.submit(Job(key, action, arguments, attempt, limit_seconds=seconds, limit_bytes=memory))

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
        found = {SLOPES: summed(self.problem.space, slopes)}
        self.asktell.learn(self.sampler_numbers[trial.number], found)
        return {**trial.sampler_attrs, **found}

    def _rival(self, number: int, known: Sequence[Measurement]) -> int | None:
        """Whom trial `number` is held against: a trial that was told before it was asked for."""
        if not self.rivals.wanted:
            return None
        while self.rivals.told <= number - self.window:
            outcome = self.told_outcomes[self.rivals.told]
            self.rivals.tell(outcome.values if outcome.beats else None)
        return self.rivals.number({m.objective: m.value for m in known})

    def _receive(self, results: Sequence[Result]) -> None:
        """Store how trials ended, and tell of it."""
        if not (ended := [each for result in results if (each := self._ended(result)) is not None]):
            return
        which = f"result of trial {ended[0][0].number}" if len(ended) == 1 else f"results of {len(ended)} trials"
        self.hold.patience.keeps = f"the {which}"
        stored = keep(self.store, [ending for _, ending in ended])
        self._keep_time()
        for (trial, ending), found in zip(ended, stored, strict=True):
            if found is None:  # somebody else finished this attempt; what is stored is what counts
                self.observer.note(f"trial {trial.number}: a late result was dropped")
                found = self.store.trial(self.study.id, trial.number, with_assignments=False)
            self.done += trial.parent is None
            self.pace.took(ending.seconds)
            outcome = outcome_of(found, self.problem.steering)
            if trial.number in self.late:
                self.late.remove(trial.number)
                self.told_outcomes[trial.number] = outcome
                self._tell_of(trial.number)
            else:
                self.outcomes[trial.number] = outcome
            found = dataclasses.replace(found, assignment=trial.assignment)
            self.observer.trial(found, self.done, self.spec.budget.trials)
        self.hold.patience.keeps = ""

    def _ended(self, result: Result) -> tuple[TrialRecord, Ending] | None:
        """The trial that a result ends, and how; None for one that is tried again, or that is not out any more."""
        flight = self.flying.get(result.job.key)
        if flight is None or flight.trial.attempt != result.job.attempt:  # of one thought dead, or sent twice
            self.observer.note(f"{result.job.key}: a late result was dropped")
            return None
        failure, assignment = result.failure, result.job.arguments["assignment"]
        trial = dataclasses.replace(flight.trial, assignment=assignment)
        if failure is not None and failure.crashed and result.job.attempt < MAX_ATTEMPTS:
            self.observer.note(f"trial {trial.number}: the worker died; trying once more")
            self._dispatch(trial, assignment, self.store.retry_trial(trial.id))
            return None
        del self.flying[result.job.key]
        measurements: list[Measurement] = []
        attrs = None
        if failure is None:
            quality, slopes = result.value if result.job.action == "measure_with_slopes" else (result.value, {})
            attrs = self._learn(trial, slopes)
            by_name = {m.objective: m for m in [*quality, *flight.computed]}
            measurements = [by_name[name] for name in self.spec.measured]
            if bad := next((m for m in measurements if not is_finite(m)), None):
                failure = Failure.of(NotFinite(f"{bad.objective} is {bad.value} under this assignment"))
        return trial, ending_of(self.spec, trial, result, failure, measurements, attrs)

    def _computed(self, assignment: Assignment) -> list[Measurement]:
        problem = self.problem
        return computed(problem.objectives, problem.info, assignment, self.costs, self.spec.target, problem.target)

    def _settle(self) -> int | None:
        """Take the outcome that is next in order, if it is known, and return its trial's number."""
        if (found := self.outcomes.pop(self.told, None)) is None:
            flight = self.flying.get(f"trial-{self.told}")
            if flight is None or not self.pace.is_late(self.executor.clock() - flight.since):
                return None
            self.observer.note(f"trial {self.told} takes far longer than others; what is proposed does not wait for it")
            self.late.add(self.told)
            found = Outcome(None)
        # A duplicate repeats an earlier number, which has been settled already.
        self.told_outcomes[self.told] = self.told_outcomes[found] if isinstance(found, int) else found
        self.told += 1
        return self.told - 1

    def _tell(self) -> None:
        """Tell the sampler, in order, of the outcomes that the next proposal waits for, as far as they are known."""
        while self._waits() and (number := self._settle()) is not None:
            if number not in self.late:
                self._tell_of(number)

    def _tell_of(self, number: int) -> None:
        if (known_as := self.sampler_numbers.get(number)) is not None:
            outcome = self.told_outcomes[number]
            self.asktell.tell(known_as, outcome.values, outcome.violations)
