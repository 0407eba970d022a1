"""New studies: their rows, under names and numbers that no other study has or had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import exc

from autoq.store import models as m


class NewStudy(NamedTuple):
    """A study to insert under the first free of name, name-2, name-3, …, with its tables; `columns` are set beside
    what every new study has."""

    name: str
    spec: Mapping[str, Any]
    objectives: Sequence[Sequence[str]]
    tables: Mapping[str, Any]
    columns: Mapping[str, Any]


_LAST_STUDY = sa.select(sa.func.max(m.studies.c.id)), sa.select(sa.func.max(m.removals.c.id))


def insert_study(
    connection: sa.Connection,
    wanted: str,
    spec: Mapping[str, Any],
    objectives: Sequence[Sequence[str]],
    tables: Mapping[str, Any] | None = None,
    **columns: Any,
) -> int:
    """A new study; its id. See `NewStudy`."""
    return insert_studies(connection, [NewStudy(wanted, spec, objectives, tables or {}, columns)])[0]


def insert_studies(connection: sa.Connection, new: Sequence[NewStudy]) -> list[int]:
    """New studies; their ids, which rise in this order. A few statements for any number of them."""
    if not new:
        return []
    for study in new:
        assert study.objectives, "a study has at least one objective"
        assert all(direction in ("minimize", "maximize") for _, _, direction in study.objectives), study.objectives
    s = m.studies
    common = {"state": "created", "changes": 1, "created_at": datetime.now(UTC), "sampler_attrs": {}}
    refused: list[str] = []
    while True:
        names = _free_names(connection, [study.name for study in new])
        rows = [
            {**common, "spec": study.spec, "objectives": [list(o) for o in study.objectives], **study.columns,
             "name": name}
            for study, name in zip(new, names, strict=True)
        ]  # fmt: skip
        if connection.dialect.name == "sqlite":
            # It would give the number of the last study again, once that one is removed.
            first = 1 + max(connection.execute(query).scalar() or 0 for query in _LAST_STUDY)
            rows = [{**row, "id": first + place} for place, row in enumerate(rows)]
        try:
            with connection.begin_nested():
                done = connection.execute(sa.insert(s).returning(s.c.id, sort_by_parameter_order=True), rows)
                ids = [int(row[0]) for row in done]
            break
        except exc.IntegrityError:
            # Another process took a name since: on to the next one.
            if names == refused:
                raise
            refused = names
    bodies = [
        {"study_id": study_id, "name": table, "body": body}
        for study, study_id in zip(new, ids, strict=True)
        for table, body in study.tables.items()
        if body is not None
    ]
    if bodies:
        connection.execute(sa.insert(m.tables), bodies)
    return ids


def _free_names(connection: sa.Connection, wanted: Sequence[str]) -> list[str]:
    """For each the first of name, name-2, name-3, … that no study has, and none before it was given."""
    s = m.studies.c
    taken = set(connection.execute(sa.select(s.name).where(s.name.in_(set(wanted)))).scalars())
    looked: set[str] = set()
    found = []
    for name in wanted:
        if name in taken and name not in looked:  # only then those beside it count
            beside = sa.select(s.name).where(s.name.startswith(f"{name}-", autoescape=True))
            taken |= set(connection.execute(beside).scalars())
            looked.add(name)
        free, count = name, 1
        while free in taken:
            count += 1
            free = f"{name}-{count}"
        taken.add(free)
        found.append(free)
    return found
