"""What those who follow a database ask for again and again: stamps, changes since, pages.

Every question is answered by an index or by a handful of rows, however many trials there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import sqlalchemy as sa

from autoq.errors import NotFound
from autoq.store import models as m
from autoq.store.clock import worker_counts
from autoq.store.database import Database
from autoq.store.loading import load_columns, load_summaries, load_trials
from autoq.store.records import StudySummary, TrialRecord, TrialState

StudySort = Literal["created", "-created", "name", "-name"]
_PREDICTED = "frontier:predicted"


class Stamp(NamedTuple):
    """Which study it is, whose, and the number of its last change: enough to know whether anything is new."""

    id: int
    name: str
    owner: str | None
    state: str
    changes: int


class Chunk(NamedTuple):
    """What changed of a study after one count of changes, up to and with `upto`: trials in order of their numbers."""

    upto: int
    trials: list[TrialRecord]
    summary: StudySummary


@dataclass(frozen=True)
class Whose:
    """Which studies somebody may see: all, or those of `user`."""

    all: bool
    user: str | None = None

    def clause(self, owner: sa.ColumnElement[Any] = m.studies.c.owner) -> sa.ColumnElement[bool]:
        """The condition on the column of owners."""
        if self.all:
            return sa.true()
        # A study without an owner is not everybody's.
        return sa.false() if self.user is None else owner == self.user


class Feed:
    """Reads of one database, cheap enough to be repeated all the time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ping(self) -> str | None:
        """The revision of the schema; raises `StoreError` where the database is out of reach."""
        return self._database.schema()

    def stamp(self, name_or_id: str) -> Stamp | None:
        """The stamp of a study by its name or id (a name made of digits goes first); None if there is none."""
        s = m.studies.c
        columns = sa.select(s.id, s.name, s.owner, s.state, s.changes)
        with self._database.reading() as connection:
            row = connection.execute(columns.where(s.name == name_or_id)).one_or_none()
            if row is None and name_or_id.isascii() and name_or_id.isdecimal() and len(name_or_id) < 10:
                row = connection.execute(columns.where(s.id == int(name_or_id))).one_or_none()
        return None if row is None else Stamp(*row)

    def versions(self, ids: Sequence[int] | None = None) -> dict[int, int]:
        """Study id -> count of its changes, of all studies or of those that are there of `ids`."""
        s = m.studies.c
        query = sa.select(s.id, s.changes)
        with self._database.reading() as connection:
            rows = connection.execute(query if ids is None else query.where(s.id.in_(ids)))
            return {row[0]: row[1] for row in rows}

    def total(self, whose: Whose) -> tuple[int, int]:
        """How many studies somebody sees, and all changes there ever were of them, removals too: what a list of them
        depends on."""
        s, t = m.studies.c, m.removals.c
        there = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(s.changes), 0)).where(whose.clause())
        gone = sa.select(sa.func.coalesce(sa.func.sum(t.changes), 0)).where(whose.clause(t.owner))
        with self._database.reading() as connection:
            count, changes = connection.execute(there).one()
            return int(count), int(changes) + int(connection.execute(gone).scalar_one())

    def workers(self) -> dict[int, int]:
        """Study id -> how many workers are at it, of studies that have any. No study's count of changes says so."""
        with self._database.reading() as connection:
            return worker_counts(connection)

    def owned(self, whose: Whose) -> set[int]:
        """The ids of the studies that somebody sees."""
        with self._database.reading() as connection:
            return set(connection.execute(sa.select(m.studies.c.id).where(whose.clause())).scalars())

    def chunk(self, study_id: int, since: int, limit: int) -> Chunk:
        """What changed after `since`, about `limit` trials of it: trials of one change are never parted.

        Raises `NotFound` for a study that is no longer there.
        """
        t = m.trials.c
        with self._database.reading() as connection:
            summaries = load_summaries(connection, [study_id])
            if not summaries:
                raise NotFound(f"no study with id {study_id}")
            own = sa.select(t.changed).where(t.study_id == study_id, t.changed > since)
            counts = list(connection.execute(own.order_by(t.changed).limit(limit + 1)).scalars())
            upto = summaries[0].changes
            if len(counts) > limit:
                upto = max((count for count in counts if count < counts[-1]), default=counts[-1])
            between = (t.study_id == study_id, t.changed > since, t.changed <= upto)
            return Chunk(upto, load_trials(connection, between) if counts else [], summaries[0])

    def summaries(self, ids: Sequence[int]) -> list[StudySummary]:
        """The studies of `ids` that are there, oldest first."""
        with self._database.reading() as connection:
            return load_summaries(connection, ids)

    def studies(
        self,
        whose: Whose,
        *,
        states: Sequence[str] = (),
        owner: str | None = None,
        search: str | None = None,
        sort: StudySort = "-created",
        after: tuple[str, int] | None = None,
        limit: int = 100,
    ) -> list[StudySummary]:
        """A page of the list of studies in the order of `sort`, after the study of that name and id.

        `search` is looked for in names, regardless of case.
        """
        s = m.studies.c
        where = [whose.clause()]
        if states:
            where.append(s.state.in_(states))
        if owner is not None:
            where.append(s.owner == owner)
        if search is not None:
            where.append(sa.func.lower(s.name).contains(search.lower(), autoescape=True))
        down, key = sort.startswith("-"), s.name if sort.endswith("name") else s.id
        if after is not None:
            bound: str | int = after[0] if sort.endswith("name") else after[1]
            where.append(key < bound if down else key > bound)
        query = sa.select(s.id).where(*where).order_by(key.desc() if down else key).limit(limit)
        with self._database.reading() as connection:
            ids = list(connection.execute(query).scalars())
            found = {summary.id: summary for summary in load_summaries(connection, ids)} if ids else {}
        return [found[study_id] for study_id in ids]

    def tables(self, ids: Sequence[int], names: Sequence[str]) -> dict[tuple[int, str], Any]:
        """(study id, table's name) -> body, of the named tables that these studies have."""
        t = m.tables.c
        query = sa.select(t.study_id, t.name, t.body).where(t.study_id.in_(ids), t.name.in_(names))
        with self._database.reading() as connection:
            return {(row.study_id, row.name): row.body for row in connection.execute(query)}

    def named(self, ids: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        """Study id -> its name and its owner, of those of `ids` that are there."""
        s = m.studies.c
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(s.id, s.name, s.owner).where(s.id.in_(ids)))
            return {row.id: (row.name, row.owner) for row in rows}

    def derived(self, study_id: int, number: int) -> list[int]:
        """The numbers of the trials that were trained from one."""
        t = m.trials.c
        query = sa.select(t.number).where(t.study_id == study_id, t.parent == number).order_by(t.number)
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def valued(self, study_id: int) -> set[tuple[int, str, str]]:
        """(trial number, objective, part) of what values per token are stored for on the frontier of a study."""
        f, t, v = m.frontier, m.trials, m.token_values
        joined = f.join(t, (t.c.id == f.c.trial_id)).join(v, v.c.trial_id == t.c.id)
        query = sa.select(t.c.number, v.c.objective, v.c.part).select_from(joined).where(f.c.study_id == study_id)
        with self._database.reading() as connection:
            return {(row[0], row[1], row[2]) for row in connection.execute(query)}

    def predictions(self, study_id: int, quality: str, since: int) -> dict[int, tuple[float, float]]:
        """Trial number -> what its sampler predicted of `quality`, and what was measured of it, for ended proposals
        that changed after `since`."""
        t, named = m.trials.c, f'"{_PREDICTED}"'
        where = (
            *(t.study_id == study_id, t.changed > since, t.origin == "sampler", t.state.in_(("complete", "stopped"))),
            sa.type_coerce(t.sampler_attrs, sa.Text).contains(named),
        )
        with self._database.reading() as connection:
            rows, measured = load_columns(connection, where)
        searched = {row[0]: row for row in measured if row[1:3] == (quality, "search")}
        found = {}
        for row in rows:
            predicted, value = json.loads(row[-1]).get(_PREDICTED), searched.get(row[0])
            if predicted is not None and value is not None:
                found[row[1]] = float(predicted), float(json.loads(value[-1]).get("estimate", value[4]))
        return found

    def counts(self) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]:
        """How many studies, trials and workers are in each state."""
        s, t, w = m.studies.c.state, m.trials, m.workers.c.state
        trials = sa.select(t.c.state, sa.func.count()).group_by(t.c.state)
        with self._database.reading() as connection:
            studies, workers = (
                {row[0]: row[1] for row in connection.execute(sa.select(c, sa.func.count()).group_by(c))}
                for c in (s, w)
            )
            found = {row[0]: row[1] for row in connection.execute(trials)}
        return studies, {state: found.get(state, 0) for state in get_args(TrialState)}, workers
