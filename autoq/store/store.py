"""The store's methods, each one short transaction.

A write first locks its study's row, by counting one change on it: that orders the writers of one study
on every database, and gives whoever follows the study a number to ask from. Results are guarded by the
attempt: of all the results that may come for one trial (a worker thought dead, a job sent twice) exactly
one is stored.

Every method raises `StoreError` in one line where the database cannot be used, `StoreAway` where that is
likely to pass by itself, and `NotFound` for a study or trial that is not there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import NotFound
from autoq.measurement import Measurement, Part
from autoq.store import dominance, results, writing
from autoq.store import models as m
from autoq.store.accounts import Accounts
from autoq.store.database import Database, Fence, open_database
from autoq.store.feed import Feed
from autoq.store.loading import (
    ONE_TRIAL,
    MeasurementRow,
    TrialRow,
    load_columns,
    load_study,
    load_summaries,
    load_trials,
    load_values,
    run_trials,
)
from autoq.store.members import damaged, members_of
from autoq.store.new_studies import insert_study
from autoq.store.packing import unpack
from autoq.store.patience import Patience, steady
from autoq.store.queue import Queue
from autoq.store.records import (
    Descent,
    Ending,
    NewTrial,
    Origin,
    StudyRecord,
    StudyState,
    StudySummary,
    TrialError,
    TrialRecord,
    TrialState,
)
from autoq.store.remarks import Remarks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoq.spec import StudySpec

_LISTED = 10


@steady
class Store:
    """One open database. May be used by several threads; not across a fork. Close it, or use `with`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url: str, create: bool = True) -> Store:
        """The store at a SQLAlchemy URL or at a plain path (SQLite); makes or migrates the schema.

        With `create` False a missing SQLite file raises `NotFound` and is not made. Raises `BadInput`
        for a URL that cannot be used, and `StoreError` for a server that does not answer, a file that
        is not an AutoQ database, and a schema that is newer than this code.
        """
        return cls(open_database(url, create))

    @property
    def url(self) -> str:
        """What `open` was given, fit to be shown: a path, or a URL with its password masked."""
        return self._database.name

    @property
    def address(self) -> str:
        """What opens this database in another process. It holds the password: it is not to be shown."""
        return self._database.address

    @property
    def queue(self) -> Queue:
        """Submissions, leases, workers and exports."""
        return Queue(self._database)

    def under(self, study_id: int, epoch: int, patience: Patience | None = None) -> Store:
        """This store for the holder of a lease: its writes on the study raise `LeaseLost`, and change nothing, once
        another one has the lease; and it waits with `patience` for a database that is away. Shares the connections."""
        return Store(self._database.fenced(Fence(study_id, epoch), patience))

    @property
    def feed(self) -> Feed:
        """What those ask who follow the database."""
        return Feed(self._database)

    @property
    def accounts(self) -> Accounts:
        """Who may use a server on this database."""
        return Accounts(self._database)

    @property
    def remarks(self) -> Remarks:
        """What people note on trials."""
        return Remarks(self._database)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Studies

    def create_study(
        self, spec: StudySpec, objectives: Sequence[Sequence[str]], tables: Mapping[str, Any] | None = None
    ) -> StudyRecord:
        """A new study in state `created`, with its `tables`. If its name is taken it becomes `name-2`, `name-3`, …

        `objectives` are (name, unit, `minimize` or `maximize`), in the order of the frontier's values.
        """
        with self._database.writing() as connection:
            study_id = insert_study(connection, spec.name, spec.model_dump(mode="json"), objectives, tables)
            return _required_study(connection, study_id)

    def study(self, name_or_id: str | int) -> StudyRecord:
        """The study of that name or id. A name made of digits is looked up as a name first."""
        with self._database.reading() as connection:
            if isinstance(name_or_id, int):
                return _required_study(connection, name_or_id)
            found = load_study(connection, m.studies.c.name == name_or_id)
            if found is None and name_or_id.isascii() and name_or_id.isdecimal() and len(name_or_id) < 10:
                found = load_study(connection, m.studies.c.id == int(name_or_id))
            if found is None:
                names = connection.execute(sa.select(m.studies.c.name).order_by(m.studies.c.id.desc())).scalars()
                raise NotFound(_no_study(name_or_id, list(names)))
            return found

    def studies(self) -> list[StudySummary]:
        """All studies, oldest first, with the counts of their trials."""
        with self._database.reading() as connection:
            return load_summaries(connection)

    def set_state(self, study_id: int, state: StudyState, message: str | None = None) -> None:
        """Record where a study stands, and why. Sets `started_at` once and `finished_at` at each end."""
        with self._database.writing() as connection:
            writing.set_state(connection, study_id, state, message)

    def save_plan(self, study_id: int, plan: Mapping[str, Any]) -> None:
        """Store the study's plan (any JSON): the fixed prefix of proposals and the facts of the space."""
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            writing.set_study(connection, study_id, plan=dict(plan))

    def save_sampler_attrs(self, study_id: int, attrs: Mapping[str, Any]) -> None:
        """Replace the sampler's own state on the study. Unlike elsewhere, NaN and inf are kept."""
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            writing.set_study(connection, study_id, sampler_attrs=dict(attrs))

    def put_table(self, study_id: int, name: str, body: Any) -> None:
        """Store or replace a named table of the study (`sensitivity`, `costs`): any JSON but null."""
        assert body is not None, name
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            writing.put_table(connection, study_id, name, body)

    def table(self, study_id: int, name: str) -> Any:
        """The named table of the study as `put_table` got it, None if there is none."""
        with self._database.reading() as connection:
            t = m.tables.c
            return connection.execute(sa.select(t.body).where(t.study_id == study_id, t.name == name)).scalar()

    def put_costs(self, key: str, device: str, body: Any) -> None:
        """Store or replace the latency table that `key` stands for: device, runtime, workload and layers."""
        with self._database.writing() as connection:
            writing.put_shared(connection, m.costs, key, device=device, body=body)

    def costs(self, key: str) -> Any:
        """The latency table of `key` as `put_costs` got it, None if there is none."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(m.costs.c.body).where(m.costs.c.key == key)).scalar()

    def put_sensitivities(self, key: str, table: Any) -> None:
        """Store or replace the sensitivities (any JSON) that `key` stands for: model and calibration data."""
        with self._database.writing() as connection:
            writing.put_shared(connection, m.sensitivities, key, body=table)

    def sensitivities(self, key: str) -> Any:
        """The sensitivities of `key` as `put_sensitivities` got them, None if there are none."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(m.sensitivities.c.body).where(m.sensitivities.c.key == key)).scalar()

    # Trials: written by the study's controller

    def start_trials(self, study_id: int, new: Sequence[NewTrial]) -> list[TrialRecord]:
        """New trials, all or none, in state `running` at attempt 1, or `duplicate`; in the same transaction, of a
        trained one its layers, and what the sampler remembers of the study then.

        Raises `StoreError` if the study has a trial of such a number, so two controllers cannot mix.
        """
        with self._database.writing() as connection:
            return writing.insert_trials(connection, study_id, new)

    def start_trial(
        self,
        study_id: int,
        number: int,
        assignment: Assignment,
        origin: Origin,
        baseline: str | None = None,
        sampler_attrs: Mapping[str, Any] | None = None,
        descent: Descent | None = None,
        study_sampler_attrs: Mapping[str, Any] | None = None,
    ) -> TrialRecord:
        """`start_trials` of one that runs."""
        new = NewTrial(number, assignment, origin, baseline, sampler_attrs or {}, study_sampler_attrs, None, descent)
        return self.start_trials(study_id, [new])[0]

    def record_duplicate(
        self,
        study_id: int,
        number: int,
        assignment: Assignment,
        duplicate_of: int,
        sampler_attrs: Mapping[str, Any] | None = None,
        origin: Origin = "sampler",
        study_sampler_attrs: Mapping[str, Any] | None = None,
    ) -> TrialRecord:
        """`start_trials` of one that ended before it began: trial `duplicate_of` has the same assignment."""
        new = NewTrial(number, assignment, origin, None, sampler_attrs or {}, study_sampler_attrs, duplicate_of)
        return self.start_trials(study_id, [new])[0]

    def retry_trial(self, trial_id: int) -> int:
        """Send a running or failed trial out again: state `running`, and the new attempt's number.

        Results of earlier attempts no longer count. Raises `StoreError` for a trial that has a result.
        """
        with self._database.writing() as connection:
            return writing.retry(connection, trial_id)

    def end_trials(self, endings: Sequence[Ending]) -> list[TrialRecord | None]:
        """Store the ends of trials of one study and what they do to its frontier, all or none, in one transaction;
        each trial as it is once that is on disk, without its assignment.

        None, and nothing of it changed, for a trial that is not running or is at another attempt, or that an earlier
        one of `endings` has ended. A trial is feasible if every violation (excess over a constraint) is <= 0; only
        then, and if it was not stopped, it can be on the frontier. The measurements of what did not fail must hold a
        search value of every objective of the study. A long traceback keeps its end. Raises `NotFinite` for a NaN or
        infinite number, and then nothing is stored.
        """
        if not endings:
            return []
        for ending in endings:
            results.check_finite(ending.measurements, ending.violations)
        with self._database.writing() as connection:
            return results.end(connection, endings)

    def finish_trial(
        self,
        trial_id: int,
        attempt: int,
        measurements: Sequence[Measurement],
        violations: Mapping[str, float],
        seconds: float,
        worker: str,
        sampler_attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """`end_trials` of one that succeeded; whether it was stored."""
        told = Ending(trial_id, attempt, seconds, worker, measurements, violations, sampler_attrs=sampler_attrs)
        return self.end_trials([told])[0] is not None

    def stop_trial(
        self,
        trial_id: int,
        attempt: int,
        measurements: Sequence[Measurement],
        violations: Mapping[str, float],
        seconds: float,
        worker: str,
    ) -> bool:
        """`end_trials` of one that was stopped: what was measured of it until then; whether it was stored."""
        told = Ending(trial_id, attempt, seconds, worker, measurements, violations, stopped=True)
        return self.end_trials([told])[0] is not None

    def fail_trial(
        self,
        trial_id: int,
        attempt: int,
        error_type: str,
        message: str,
        traceback: str,
        seconds: float,
        worker: str,
        sampler_attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """`end_trials` of one that failed; whether it was stored."""
        error = TrialError(error_type, message, traceback)
        told = Ending(trial_id, attempt, seconds, worker, error=error, sampler_attrs=sampler_attrs)
        return self.end_trials([told])[0] is not None

    def add_measurements(self, trial_id: int, measurements: Sequence[Measurement]) -> None:
        """Store or replace report measurements of a complete trial. The frontier stays: it is made of
        search values. Raises `NotFinite`."""
        results.check_finite(measurements, {})
        with self._database.writing() as connection:
            results.report(connection, trial_id, measurements)

    # Trials: read by everyone

    def trial(self, study_id: int, number: int, with_assignments: bool = True) -> TrialRecord:
        """One trial of a study, by its number."""
        # A number that no column holds is a trial that is not there; drivers refuse to ask for it.
        possible = 0 <= number < 2**31
        with self._database.reading() as connection:
            which = {"of": study_id, "at": number}
            found = run_trials(connection, ONE_TRIAL, with_assignments, which) if possible else []
            if not found:
                raise NotFound(_no_trial(connection, study_id, number))
            return found[0]

    def trial_by_id(self, trial_id: int, with_assignments: bool = True) -> TrialRecord:
        """One trial, by its id."""
        with self._database.reading() as connection:
            return _one(connection, trial_id, with_assignments)

    def trials(
        self,
        study_id: int,
        states: Sequence[TrialState] | None = None,
        with_assignments: bool = False,
        after: int | None = None,
        limit: int | None = None,
        changed_since: int | None = None,
        parent: int | None = None,
    ) -> list[TrialRecord]:
        """The trials of a study in the order of their numbers.

        `states` keeps those in one of them. `after` and `limit` page: numbers greater than `after`, at
        most `limit` of them. `changed_since` keeps what changed after that count of the study's
        `changes`, frontier membership included. `parent` keeps what was made of that trial.
        """
        t = m.trials.c
        where = [t.study_id == study_id]
        if parent is not None:
            where.append(t.parent == parent)
        if states is not None:
            where.append(t.state.in_(states))
        if after is not None:
            where.append(t.number > after)
        if changed_since is not None:
            where.append(t.changed > changed_since)
        with self._database.reading() as connection:
            whole = states is None and len(where) == 1 and limit is None
            found = load_trials(connection, where, with_assignments=with_assignments, limit=limit, whole=whole)
            if not found:
                _check_empty(connection, study_id, whole)
            return found

    def trial_columns(
        self, study_id: int, after: int | None = None, limit: int | None = None, changed_since: int | None = None
    ) -> tuple[list[TrialRow], list[MeasurementRow]]:
        """What `trials` finds, as plain rows of `load_columns`: for whoever reads all trials of a large study."""
        t = m.trials.c
        where = [t.study_id == study_id]
        if after is not None:
            where.append(t.number > after)
        if changed_since is not None:
            where.append(t.changed > changed_since)
        with self._database.reading() as connection:
            found = load_columns(connection, where, limit)
            if not found[0]:
                _required_study(connection, study_id)
            return found

    def running_trials(self, study_id: int) -> list[TrialRecord]:
        """The trials that are running, or were when their controller ended, with their assignments."""
        return self.trials(study_id, states=("running",), with_assignments=True)

    def find(self, study_id: int, assignment_hash: str) -> TrialRecord | None:
        """The trial of a study that holds the result for an assignment, complete before others, if any."""
        t = m.trials.c
        ended = ("complete", "stopped", "failed")
        where = (t.study_id == study_id, t.assignment == assignment_hash, t.state.in_(ended))
        with self._database.reading() as connection:
            found = load_trials(connection, where)
        return min(found, key=lambda trial: (ended.index(trial.state), trial.number), default=None)

    def token_values(self, study_id: int, number: int, objective: str, part: Part) -> NDArray[np.float32] | None:
        """The values (windows, tokens) whose mean is a trial's measurement, None where none are stored.

        NaN marks tokens that do not count and, of a stopped trial, those that were not evaluated. Others are kept to
        twelve significant bits.
        """
        with self._database.reading() as connection:
            return load_values(connection, study_id, number, objective, part)

    def frontier(self, study_id: int, with_assignments: bool = False) -> list[TrialRecord]:
        """The feasible complete trials that no other one dominates, in the order of their numbers."""
        where = (m.trials.c.study_id == study_id,)
        with self._database.reading() as connection:
            found = load_trials(connection, where, with_assignments=with_assignments, only_frontier=True)
            if not found:
                _check_empty(connection, study_id, whole=True)
            return found

    def recompute_frontier(self, study_id: int) -> list[int]:
        """The numbers of the trials on the frontier, from all trials at once: a check of the stored one."""
        with self._database.reading() as connection:
            study = _required_study(connection, study_id)
            t = m.trials.c
            feasible = load_trials(connection, (t.study_id == study_id, t.state == "complete", t.feasible))
        names = [objective.name for objective in study.objectives]
        kept = dominance.non_dominated([trial.values(names) for trial in feasible], study.directions)
        return [feasible[index].number for index in kept]

    def trained_layers(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The content of trained layers, by digest. Raises `NotFound` for one that is not there."""
        t, found = m.trained_layers.c, {}
        with self._database.reading() as connection:
            for digest in digests:
                body = connection.execute(sa.select(t.body).where(t.digest == digest)).scalar()
                if body is None:
                    raise NotFound(f"no trained layer with digest {digest[:80]!r}")
                found[digest] = bytes(body)
        return found

    def assignment(self, assignment_hash: str) -> Assignment:
        """The assignment of that hash."""
        with self._database.reading() as connection:
            a = m.assignments.c
            body = connection.execute(sa.select(a.body).where(a.hash == assignment_hash)).scalar()
            if body is None:
                raise NotFound(f"no assignment with hash {assignment_hash[:80]!r}")
            return unpack(body)


def _required_study(connection: sa.Connection, study_id: int) -> StudyRecord:
    found = load_study(connection, m.studies.c.id == study_id)
    if found is None:
        raise NotFound(f"no study with id {study_id}")
    return found


def _check_empty(connection: sa.Connection, study_id: int, whole: bool) -> None:
    """Of a study without trials: it is there, and if these would be all, it has no frontier either."""
    _required_study(connection, study_id)
    if whole:
        study, ids = members_of(connection, study_id)
        if ids:
            raise damaged(study)


def _one(connection: sa.Connection, trial_id: int, with_assignments: bool = False) -> TrialRecord:
    found = load_trials(connection, (m.trials.c.id == trial_id,), with_assignments=with_assignments)
    if not found:
        raise NotFound(f"no trial with id {trial_id}")
    return found[0]


def _no_study(name: str, names: Sequence[str]) -> str:
    if not names:
        return f"no study {name[:128]!r}; the database has none"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}? there are" if near else "; there are"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"no study {name[:128]!r}{hint} {', '.join(names[:_LISTED])}{more}"


def _no_trial(connection: sa.Connection, study_id: int, number: int) -> str:
    study = _required_study(connection, study_id)
    t = m.trials.c
    query = sa.select(sa.func.min(t.number), sa.func.max(t.number)).where(t.study_id == study_id)
    first, last = connection.execute(query).one()
    there = "it has none" if first is None else f"its trials are {first} to {last}"
    return f"study {study.name!r} has no trial {number}; {there}"
