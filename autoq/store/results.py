"""What the end of trials does inside its transaction: results, their measurements and the frontier.

Any number of trials of one study end in one transaction, with as many statements as one takes: a commit waits for the
disk, and putting a statement through takes longer than what it does. Each result is guarded by its own attempt.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from autoq.errors import NotFinite, StoreError
from autoq.measurement import Measurement
from autoq.store import dominance, members
from autoq.store import models as m
from autoq.store.checksum import checksum, members_checksum
from autoq.store.loading import OWN, as_record, load_measurements, load_trials
from autoq.store.packing import pack_values
from autoq.store.records import Ending, TrialRecord
from autoq.store.writing import Locked, as_text, lock_of, now, set_study

# What every group of results needs, made once: putting a statement together takes as long as running it.
_KEY = sa.bindparam("key", type_=sa.Integer)
_AT = sa.bindparam("at", type_=sa.Integer)
_RUNNING = sa.select(*OWN).where(
    m.trials.c.study_id == _KEY,
    m.trials.c.id.in_(sa.bindparam("ids", expanding=True)),
    m.trials.c.state == "running",
)
_RESULT = ("state", "feasible", "violations", "error_type", "error_message", "traceback", "seconds", "worker")
_SET = (*_RESULT, "sampler_attrs", "checksum", "changed", "finished_at")
_END = (
    sa.update(m.trials)
    .where(m.trials.c.id == _KEY, m.trials.c.attempt == _AT, m.trials.c.state == "running")
    .values({name: sa.bindparam(f"new_{name}", type_=m.trials.c[name].type) for name in _SET})
)
_FRONTIER = sa.select(m.frontier.c.trial_id, sa.type_coerce(m.frontier.c.point, sa.Text)).where(
    m.frontier.c.study_id == _KEY
)
_NEW_MEASUREMENTS, _NEW_VALUES, _NEW_MEMBERS = map(sa.insert, (m.measurements, m.token_values, m.frontier))


def check_finite(measurements: Sequence[Measurement], violations: Mapping[str, float]) -> None:
    """Raises `NotFinite` for the first number that is NaN or infinite."""
    for measurement in measurements:
        for number in (measurement.value, measurement.stderr or 0.0):
            if not math.isfinite(number):
                raise NotFinite(f"{measurement.objective} came out as {number} ({measurement.part} part)")
    for name, excess in violations.items():
        if not math.isfinite(excess):
            raise NotFinite(f"the excess over the constraint on {name} came out as {excess}")


def end(connection: sa.Connection, endings: Sequence[Ending]) -> list[TrialRecord | None]:
    """End trials of one study, as `endings` tell: what is stored of each then, without its assignment.

    None for one that is not running at that attempt, or that an earlier one of `endings` has ended. If all are,
    everything is undone.
    """
    study = lock_of(connection, endings[0].trial_id)
    # Whoever changes a trial holds the study's row, so what is found here stays true until the commit.
    found = connection.execute(_RUNNING, {"key": study.id, "ids": sorted({ending.trial_id for ending in endings})})
    running = {row.id: row._asdict() for row in found}
    accepted: list[tuple[Ending, dict[str, Any]] | None] = []
    for ending in endings:
        row = running.get(ending.trial_id)
        if row is None or row["attempt"] != ending.attempt:
            accepted.append(None)
            continue
        del running[ending.trial_id]
        row |= _outcome(study, ending) | {"changed": study.change, "finished_at": now()}
        row["checksum"] = checksum(row, ending.measurements)
        accepted.append((ending, row))
    ended = [each for each in accepted if each is not None]
    if not ended:
        connection.rollback()
        return [None] * len(endings)
    rows = [{"key": row["id"], "at": row["attempt"], **{f"new_{name}": row[name] for name in _SET}} for _, row in ended]
    done = connection.execute(_END, rows).rowcount
    assert done == len(rows), "a trial changed under the study's lock"
    # They were running, and what runs has no measurements to replace.
    _insert_measurements(connection, [(ending.trial_id, each) for ending, _ in ended for each in ending.measurements])
    joined = {row["id"]: _point_of(study, ending) for ending, row in ended if row["feasible"]}
    on_frontier = _update_frontier(connection, study, joined) if joined else set()
    return [None if each is None else _record(study, *each, on_frontier) for each in accepted]


def _outcome(study: Locked, ending: Ending) -> dict[str, Any]:
    """What an ending sets, in every column of a result."""
    columns = dict.fromkeys(_RESULT) | {"seconds": ending.seconds, "worker": as_text(ending.worker)}
    if ending.sampler_attrs is not None:
        columns["sampler_attrs"] = dict(ending.sampler_attrs)
    if (error := ending.error) is not None:
        assert not ending.measurements, "what failed has no measurements"
        told = {"error_type": error.type, "error_message": error.message, "traceback": error.traceback}
        return columns | {"state": "failed"} | {name: as_text(text) for name, text in told.items()}
    _point_of(study, ending)
    feasible = all(excess <= 0 for excess in ending.violations.values())
    return columns | {
        "state": "stopped" if ending.stopped else "complete",
        "feasible": None if ending.stopped else feasible,
        "violations": {name: float(excess) for name, excess in ending.violations.items()},
    }


def _point_of(study: Locked, ending: Ending) -> list[float]:
    """The values of the study's objectives."""
    searched = {each.objective: each.value for each in ending.measurements if each.part == "search"}
    missing = [name for name, _, _ in study.objectives if name not in searched]
    assert not missing, f"no search value of {', '.join(missing)}"
    return [float(searched[name]) for name, _, _ in study.objectives]


def _record(study: Locked, ending: Ending, row: dict[str, Any], on_frontier: set[int]) -> TrialRecord:
    measured = {
        (each.objective, each.part): replace(each, value=float(each.value), per_token=None)
        for each in sorted(ending.measurements, key=lambda each: (each.objective, each.part))
    }
    return as_record({**row, "study": study.name, "on_frontier": row["id"] in on_frontier}, measured)


def report(connection: sa.Connection, trial_id: int, measurements: Sequence[Measurement]) -> None:
    """Put report measurements on a complete trial."""
    assert all(measurement.part == "report" for measurement in measurements), "search values end with the trial"
    study = lock_of(connection, trial_id)
    t = m.trials
    touched = sa.update(t).where(t.c.id == trial_id, t.c.state == "complete").values(changed=study.change)
    if connection.execute(touched).rowcount == 0:
        raise StoreError(f"the trial with id {trial_id} of study {study.name!r} is not complete")
    load_trials(connection, (t.c.id == trial_id,))  # what is damaged is not to be sealed again
    _put_measurements(connection, trial_id, measurements)
    seal(connection, trial_id)


def seal(connection: sa.Connection, trial_id: int) -> None:
    """Give a trial the checksum of what is stored of it now."""
    t = m.trials
    row = connection.execute(sa.select(*OWN).where(t.c.id == trial_id)).one()
    own = sa.select(m.measurements).where(m.measurements.c.trial_id == trial_id)
    measured = load_measurements(connection, own).get(trial_id, {})
    connection.execute(
        sa.update(t).where(t.c.id == trial_id).values(checksum=checksum(row._asdict(), measured.values()))
    )


def _put_measurements(connection: sa.Connection, trial_id: int, measurements: Sequence[Measurement]) -> None:
    if not measurements:
        return
    keys = {(measurement.objective, measurement.part) for measurement in measurements}
    # Delete and insert is an upsert in everybody's SQL; the study's lock makes it one step.
    for table in (m.measurements, m.token_values):
        t = table.c
        replaced = sa.or_(*(sa.and_(t.objective == objective, t.part == part) for objective, part in keys))
        connection.execute(sa.delete(table).where(t.trial_id == trial_id, replaced))
    _insert_measurements(connection, [(trial_id, measurement) for measurement in measurements])


def _insert_measurements(connection: sa.Connection, measured: Sequence[tuple[int, Measurement]]) -> None:
    """Of any trials, by their ids."""
    keys = {(trial_id, measurement.objective, measurement.part) for trial_id, measurement in measured}
    assert len(keys) == len(measured), "an objective is measured twice in one part"
    if not measured:
        return
    rows, values = [], []
    for trial_id, measurement in measured:
        named = {"trial_id": trial_id, "objective": measurement.objective, "part": measurement.part}
        rows.append(measurement.to_json() | named | {"value": float(measurement.value)})
        if measurement.per_token is not None:
            values.append(named | pack_values(measurement.per_token))
    connection.execute(_NEW_MEASUREMENTS, rows)
    if values:
        connection.execute(_NEW_VALUES, values)


def _update_frontier(connection: sa.Connection, study: Locked, points: Mapping[int, Sequence[float]]) -> set[int]:
    """Let feasible points join the stored frontier, and what they dominate leave; those of them that are on it then."""
    f, t = m.frontier, m.trials
    stored = {row[0]: row[1] for row in connection.execute(_FRONTIER, {"key": study.id})}
    members.check(study.id, study.name, study.members, list(stored.items()))
    known = {member: _point(text) for member, text in stored.items()}
    added, removed = dominance.update(known, points, [direction for _, _, direction in study.objectives])
    if not added:
        return set()
    if removed:
        connection.execute(sa.delete(f).where(f.c.study_id == study.id, f.c.trial_id.in_(removed)))
        connection.execute(sa.update(t).where(t.c.id.in_(removed)).values(changed=study.change))
    rows = [{"study_id": study.id, "trial_id": trial_id, "point": list(points[trial_id])} for trial_id in added]
    connection.execute(_NEW_MEMBERS, rows)
    left = {member: text for member, text in stored.items() if member not in set(removed)}
    left |= {row["trial_id"]: json.dumps(row["point"], separators=(",", ":")) for row in rows}
    now_on = members_checksum(study.id, left.items())
    set_study(connection, study.id, members=now_on)
    members.remember(now_on, frozenset(left))
    return set(added)


@functools.lru_cache(maxsize=16384)
def _point(text: str) -> tuple[float, ...]:
    """The values of a stored point. The same few hundred are read with every result."""
    return tuple(json.loads(text))
