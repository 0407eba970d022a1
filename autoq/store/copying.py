"""A database, or some of its studies, into another one: a backup, a move from SQLite to PostgreSQL or back, a rescue.

    copy(source, target)                       # all of it, into an empty database
    copy(source, target, ["demo"])             # a study, into any
    copy(source, target, rescue=True)          # what is whole of a damaged one
    copy(source, None)                         # only the check

The source is read in one transaction, so a study that runs meanwhile is copied as it stood at one moment, and what is
read is held against its checksums. The target is written in one, so that it has everything or nothing. The whole keeps
its ids; a study that joins others gets new ones, and another name where its own is taken. Leases and workers stay
behind: they are of processes.

Rows are found by primary key and no other index, which may be what is damaged. A rescue that cannot read some rows of a
table tries all of them one by one. It leaves out what does not hold, says so, and computes frontiers again. A trial
whose result does not hold, but whose assignment does, waits to be measured again; one whose row is gone stands as
failed, since trials are numbered without gaps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from autoq.errors import AutoQError, BadInput, StoreError
from autoq.store import dominance, writing
from autoq.store import models as m
from autoq.store.checksum import WAY_OUT, members_checksum, own_of
from autoq.store.database import sqlite_file
from autoq.store.loading import hold, measurement_row
from autoq.store.members import damaged, members_of
from autoq.store.new_studies import NewStudy, insert_studies
from autoq.store.store import Store

_PAGE = 500
_DIGEST = re.compile(rb"#([0-9a-f]{40})")  # of a trained layer, in an assignment's JSON
_UNREADABLE = (AutoQError, exc.DatabaseError, ValueError, LookupError, TypeError, AttributeError, zlib.error)
_NUMBERED = (m.studies, m.trials, m.tokens, m.exports)  # ids that the database gives
_STOPS = {"running": "interrupted", "queued": "interrupted"}  # of a study that leaves its queue
_PROPOSED = ("baseline", "seed", "sampler", "refine")  # what its study measures by itself
_NO_RESULT = ("feasible", "violations", "error_type", "error_message", "traceback", "worker", "seconds", "finished_at")


@dataclass
class Copied:
    """The names of the studies at the target, how many trials they have, and what was left out, a line each."""

    studies: list[str] = field(default_factory=list)
    trials: int = 0
    left_out: list[str] = field(default_factory=list)


def copy(source: Store, target: Store | None, names: Sequence[str] = (), rescue: bool = False) -> Copied:
    """Copy all studies, or those of `names`, and say what was. See the module's docstring.

    Raises `NotFound` for a name that is not there, `BadInput` for a target that is the source, or that has studies
    where everything is to be copied, and `StoreError` for what is damaged, unless it is to be rescued.
    """
    wanted = {source.study(name).id for name in names}
    if not rescue and (found := source._database.damage()) is not None:
        raise StoreError(f"the database {source.url!r} is damaged: {found}; {WAY_OUT}")
    if target is None:
        with source._database.reading() as old:
            return _Copy(source, old, None, rescue, wanted).run()
    if target.address == source.address:
        raise BadInput("a database cannot be copied into itself")
    with source._database.reading() as old, target._database.writing() as new:
        if not wanted and new.execute(sa.select(m.studies.c.id).limit(1)).first() is not None:
            raise BadInput(f"the database {target.url!r} has studies already; name those that shall join them")
        return _Copy(source, old, new, rescue, wanted).run()


@contextlib.contextmanager
def opened_target(url: str) -> Iterator[Store]:
    """A database to copy into. The file of one that is made for that goes again if the copy fails."""
    file = sqlite_file(url)
    made = file is not None and not file.exists()
    try:
        with Store.open(url) as target:
            yield target
    except BaseException:
        for suffix in ("", "-wal", "-shm") if made else ():
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        raise


def _is(body: bytes, assignment: str) -> bool:
    """Whether a stored assignment is the one of that hash, without making its layers. Raises `zlib.error`."""
    return hashlib.sha256(zlib.decompress(body)).hexdigest() == assignment


def _lost(message: str) -> dict[str, Any]:
    return {"state": "failed", "error_type": "Lost", "error_message": message, "traceback": "", "checksum": None}


class _Copy:
    """One copy while it is made. Without `new` everything is read and nothing written."""

    def __init__(
        self, source: Store, old: sa.Connection, new: sa.Connection | None, rescue: bool, wanted: set[int]
    ) -> None:
        self.source, self.old, self.new, self.rescue, self.wanted = source, old, new, rescue, wanted
        self.done = Copied()
        self.names: dict[int, str] = {}  # of the studies that are copied, by their ids at the source, as all below
        self.objectives: dict[int, list[list[str]]] = {}
        self.ids: dict[int, int] = {}  # of the studies at the target
        self.points: dict[int, dict[int, tuple[int, list[float]]]] = {}  # trial -> its id at the target, its values
        self.there: set[str] = set()  # the assignments that are at the target, by hash
        self.digests: set[bytes] = set()  # of the trained layers that they name
        self.scanned: dict[str, bytes] | None = None
        self.next: dict[int, int] = {}  # the number of a study's next trial, in a rescue
        self.lost: dict[int, set[int]] = {}  # trials without a result now
        self.waiting: set[int] = set()  # studies of which some are to be measured again

    def run(self) -> Copied:
        """All of it."""
        for page in self._pages(m.studies):
            for row in page:
                if not self.wanted or row.id in self.wanted:
                    self._study(row._asdict())
        for page in self._pages(m.trials):
            # By the columns' keys: one is called otherwise in the database.
            own = [row for row in page if row.study_id in self.ids]
            self._trials([{column.key: row._mapping[column] for column in m.trials.c} for row in own])
        for page in self._pages(m.trained_layers):
            for row in page:
                if not self.wanted or row.digest.encode() in self.digests:
                    self._insert(m.trained_layers, [row._asdict()], missing="digest")
        of_study = (m.tables, m.remarks) if self.wanted else (m.tables, m.remarks, m.submissions, m.exports)
        for table in of_study:
            for page in self._pages(table):
                rows = [row._asdict() for row in page if row.study_id in self.ids]
                self._insert(table, [row | {"study_id": self.ids[row["study_id"]]} for row in rows])
        for table in () if self.wanted else (m.costs, m.sensitivities, m.tokens, m.removals):
            for page in self._pages(table):
                self._insert(table, [row._asdict() for row in page])
        for study_id in self.ids:
            self._frontier(study_id)
            if study_id in self.waiting and self.new is not None:
                said = "rescued from a damaged database; resume it to measure again what was lost"
                writing.set_study(self.new, self.ids[study_id], state="interrupted", message=said)
        if self.new is not None and self.new.dialect.name == "postgresql":
            for table in _NUMBERED:
                top = self.new.execute(sa.select(sa.func.max(table.c.id))).scalar()
                if table is m.studies:  # those of removed ones are not given again
                    top = max(top or 0, self.new.execute(sa.select(sa.func.max(m.removals.c.id))).scalar() or 0) or None
                if top is not None:
                    sequence = sa.func.pg_get_serial_sequence(table.name, "id")
                    self.new.execute(sa.select(sa.func.setval(sequence, top)))
        return self.done

    # Reading the source

    def _all(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        """What a query finds at the source; raises `StoreError` that names the source."""
        with self.source._database.refusals():
            return list(self.old.execute(query).all())

    def _pages(self, table: sa.Table) -> Iterator[list[sa.Row[Any]]]:
        """All rows of a table in the order of its key."""
        keys, last = list(table.primary_key.columns), None
        key = keys[0] if len(keys) == 1 else sa.tuple_(*keys)
        while True:
            query = sa.select(table).order_by(*keys).limit(_PAGE)
            try:
                page = self._all(query if last is None else query.where(key > last))
            except StoreError:
                if not self.rescue:
                    raise
                yield from self._singly(table, keys, last)
                return
            yield page
            if len(page) < _PAGE:
                return
            values = tuple(page[-1]._mapping[each] for each in keys)
            last = values[0] if len(keys) == 1 else values

    def _singly(self, table: sa.Table, keys: list[sa.Column[Any]], last: Any) -> Iterator[list[sa.Row[Any]]]:
        """The rows of a table after `last`, each for itself; those that cannot be read are left out."""
        key = keys[0] if len(keys) == 1 else sa.tuple_(*keys)
        query = sa.select(*keys).order_by(*keys)
        try:
            found = [tuple(row) for row in self._all(query if last is None else query.where(key > last))]
        except StoreError as problem:
            if table not in _NUMBERED:
                self._leave_out(f"what follows in table {table.name!r}", problem)
                return
            found = [(number,) for number in range((last or 0) + 1, self._top(table) + 1)]
        for values in found:
            same = [column == value for column, value in zip(keys, values, strict=True)]
            try:
                page = self._all(sa.select(table).where(*same))
            except StoreError as problem:
                self._leave_out(f"row {', '.join(map(str, values))} of table {table.name!r}", problem)
            else:
                yield page

    def _top(self, table: sa.Table) -> int:
        """The largest id that can be read."""
        try:
            return int(self._all(sa.select(sa.func.max(table.c.id)))[0][0] or 0)
        except StoreError as problem:
            self._leave_out(f"what follows in table {table.name!r}", problem)
            return 0

    def _leave_out(self, what: str, problem: Exception, more: str = "") -> None:
        said = " ".join(str(problem).split()).partition("; go back")[0].removeprefix(f"{what} is damaged: ")
        self.done.left_out.append(f"{what}: {said}{more}")

    @contextlib.contextmanager
    def _kept(self, what: str) -> Iterator[None]:
        """Of what cannot be copied: left out of a rescue, refused otherwise."""
        try:
            yield
        except _UNREADABLE as problem:
            if not self.rescue:
                if isinstance(problem, AutoQError):
                    raise
                raise StoreError(f"{what} is damaged: {problem}; {WAY_OUT}") from problem
            self._leave_out(what, problem)

    # Writing the target

    def _insert(self, table: sa.Table, rows: list[dict[str, Any]], missing: str | None = None) -> None:
        if self.new is None or not rows:
            return
        if missing is not None:
            rows = [row for row in rows if self._is_new(table.c[missing], row[missing])]
        if rows:
            self.new.execute(sa.insert(table), rows)

    def _is_new(self, column: sa.Column[Any], value: str) -> bool:
        assert self.new is not None
        return not self.wanted or self.new.execute(sa.select(column).where(column == value)).first() is None

    def _study(self, row: dict[str, Any]) -> None:
        old_id, name, stays = row.pop("id"), row.pop("name"), not self.wanted
        spec, objectives = row.pop("spec"), row.pop("objectives")
        with self._kept(f"study {name!r}"):
            if not (isinstance(spec, dict) and all(each[2] in ("minimize", "maximize") for each in objectives)):
                raise StoreError(f"study {name!r} is damaged: its spec or its objectives are not what was stored")
            del row["members"]
            if not stays:
                row["state"] = _STOPS.get(row["state"], row["state"])
                row |= {"owner": None, "request": None, "queued_at": None}
            given = {"id": old_id} if stays else {}
            self.ids[old_id] = old_id
            if self.new is not None:
                new = NewStudy(name, spec, objectives, {}, {**row, **given})
                (self.ids[old_id],) = insert_studies(self.new, [new])
                names = sa.select(m.studies.c.name).where(m.studies.c.id == self.ids[old_id])
                self.done.studies.append(self.new.execute(names).scalar_one())
            else:
                self.done.studies.append(name)
            self.names[old_id], self.objectives[old_id], self.points[old_id] = name, objectives, {}
            self.next[old_id], self.lost[old_id] = 0, set()

    def _trials(self, rows: list[dict[str, Any]]) -> None:
        """One page of trials with what belongs to them."""
        if not rows:
            return
        bodies = self._assignments({row["assignment"] for row in rows})
        measured, values = (
            self._of_trials(table, [row["id"] for row in rows]) for table in (m.measurements, m.token_values)
        )
        whole: list[dict[str, Any]] = []
        for row in rows:
            study_id, found = row["study_id"], None if measured is None else measured.get(row["id"], [])
            with self._kept(f"trial {row['number']} of study {self.names[study_id]!r}"):
                try:
                    self._hold(row, found, bodies)
                except _UNREADABLE as problem:
                    if not self.rescue or (again := self._again(row, bodies)) is None:
                        raise
                    whole.append(again)
                    what = f"trial {row['number']} of study {self.names[study_id]!r}"
                    self._leave_out(what, problem, "; it waits to be measured again")
                    continue
                whole += self._fill(row)
                whole.append(row)
                self.digests |= set(_DIGEST.findall(zlib.decompress(bodies[row["assignment"]])))
        self.done.trials += len(whole)
        if self.new is None or not whole:
            return
        fresh = {row["assignment"] for row in whole} - self.there
        known = [{"hash": each, "body": bodies[each]} for each in sorted(fresh)]
        self._insert(m.assignments, known, missing="hash")
        self.there |= fresh
        given = [{**row, "study_id": self.ids[row["study_id"]]} for row in whole]
        if self.wanted or self.rescue:
            for row in given:
                del row["id"]
            done = self.new.execute(sa.insert(m.trials).returning(m.trials.c.id, sort_by_parameter_order=True), given)
            ids = [int(each[0]) for each in done]
        else:
            self.new.execute(sa.insert(m.trials), given)
            ids = [row["id"] for row in whole]
        ended = {row["id"]: new for row, new in zip(whole, ids, strict=True) if row["state"] != "running"}
        for row in whole:
            if (point := self.points[row["study_id"]].get(row["id"])) is not None:
                self.points[row["study_id"]][row["id"]] = ended[row["id"]], point[1]
        for table, of_trial in ((m.measurements, measured), (m.token_values, values)):
            found = [each | {"trial_id": new} for old, new in ended.items() for each in (of_trial or {}).get(old, ())]
            self._insert(table, found)

    def _hold(self, row: dict[str, Any], measured: list[dict[str, Any]] | None, bodies: dict[str, bytes]) -> None:
        """Raises for a trial that is not what was stored; else keeps where it stands among the others."""
        name = self.names[row["study_id"]]
        if measured is None or (body := bodies.get(row["assignment"])) is None:
            raise StoreError("its assignment or its measurements cannot be read")
        if not _is(body, row["assignment"]):
            raise StoreError("its assignment is another one")
        if row["checksum"] is not None:
            own = own_of(row | {"hash": row["assignment"]})
            hold(row["checksum"], name, row["number"], own, map(measurement_row, measured))
        self._note_point(row, measured)

    def _again(self, row: dict[str, Any], bodies: dict[str, bytes]) -> dict[str, Any] | None:
        """A trial whose result does not hold as one that waits to be measured again, where it is clear which it is."""
        study_id, body = row["study_id"], bodies.get(row["assignment"])
        if row["number"] != self.next[study_id] or row["origin"] not in _PROPOSED or body is None:
            return None
        with contextlib.suppress(*_UNREADABLE):
            if _is(body, row["assignment"]):
                self.lost[study_id].add(row["number"])
                self.waiting.add(study_id)
                self.next[study_id] += 1
                fresh = {"state": "running", "attempt": row["attempt"] + 1, "duplicate_of": None, "checksum": None}
                return row | dict.fromkeys(_NO_RESULT) | fresh
        return None

    def _fill(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Failed trials for the numbers that are missing before this one. A duplicate of what is lost is lost too."""
        if not self.rescue:
            return []
        study_id, number = row["study_id"], row["number"]
        gone = range(self.next[study_id], number)
        self.lost[study_id] |= set(gone)
        self.next[study_id] = number + 1
        if row["duplicate_of"] in self.lost[study_id]:
            self.lost[study_id].add(number)
            row |= {"duplicate_of": None, **_lost(f"trial {number} repeated one that is lost")}
        standing: dict[str, Any] = {
            "baseline": None,
            "duplicate_of": None,
            "parent": None,
            "derivation": None,
            "sampler_attrs": {},
        }
        for each in gone:
            self._leave_out(f"trial {each} of study {self.names[study_id]!r}", StoreError("its row cannot be read"))
        told = "its row could not be read in a damaged database; the assignment that stands here is of trial"
        return [
            row | dict.fromkeys(_NO_RESULT) | standing | _lost(f"{told} {number}")
            | {"id": None, "number": each, "origin": "sampler", "attempt": 1}
            for each in gone
        ]  # fmt: skip

    def _note_point(self, row: dict[str, Any], measured: list[dict[str, Any]]) -> None:
        if row["state"] == "complete" and row["feasible"]:
            searched = {each["objective"]: each["value"] for each in measured if each["part"] == "search"}
            point = [float(searched[name]) for name, _, _ in self.objectives[row["study_id"]]]
            self.points[row["study_id"]][row["id"]] = row["id"], point

    def _assignments(self, hashes: set[str]) -> dict[str, bytes]:
        a = m.assignments.c
        try:
            if self.scanned is None:
                found = self._all(sa.select(a.hash, a.body).where(a.hash.in_(hashes)))
                bodies = {row.hash: bytes(row.body) for row in found}
                if hashes <= bodies.keys() or not self.rescue:
                    return bodies
        except StoreError:
            if not self.rescue:
                raise
        if self.scanned is None:  # the index of their hashes may be what is damaged
            self.scanned = {}
            with contextlib.suppress(StoreError):
                for row in self._all(sa.select(a.hash, a.body)):
                    self.scanned[row.hash] = bytes(row.body)
        return self.scanned

    def _of_trials(self, table: sa.Table, ids: list[int]) -> dict[int, list[dict[str, Any]]]:
        """The rows of a table of these trials; of a damaged one, of those that can be read."""
        column = table.c.trial_id
        try:
            rows = self._all(sa.select(table).where(column.between(ids[0], ids[-1])).order_by(column))
            found: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                found.setdefault(row.trial_id, []).append(row._asdict())
            return found
        except StoreError:
            if not self.rescue:
                raise
        found = {}
        for trial_id in ids:
            with self._kept(f"{table.name.replace('_', ' ')} of the trial with id {trial_id}"):
                found[trial_id] = [row._asdict() for row in self._all(sa.select(table).where(column == trial_id))]
        return found

    def _frontier(self, study_id: int) -> None:
        """The frontier from the trials that were copied; unless it is a rescue, the stored one must be the same."""
        points, directions = self.points[study_id], [direction for _, _, direction in self.objectives[study_id]]
        old = list(points)
        kept = [old[i] for i in dominance.non_dominated([points[i][1] for i in old], directions)]
        if not self.rescue:
            with self.source._database.refusals():
                name, ids = members_of(self.old, study_id)
            if ids is not None and ids != set(kept):
                raise damaged(name)
        if self.new is None:
            return
        at = self.ids[study_id]
        self._insert(m.frontier, [{"study_id": at, "trial_id": points[i][0], "point": points[i][1]} for i in kept])
        stored = [(points[i][0], json.dumps(points[i][1], separators=(",", ":"))) for i in kept]
        writing.set_study(self.new, at, members=members_checksum(at, stored))
