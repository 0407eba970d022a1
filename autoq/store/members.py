"""Who is on a study's frontier, held against the checksum of them that the study carries."""

from __future__ import annotations

import threading
from collections import OrderedDict

import sqlalchemy as sa

from autoq.errors import StoreError
from autoq.store import models as m
from autoq.store.checksum import WAY_OUT, members_checksum

_KEPT = 256
_known: OrderedDict[str, frozenset[int]] = OrderedDict()  # by their checksum, which holds for no others
_turn = threading.Lock()
_STORED = sa.select(m.studies.c.name, m.studies.c.members).where(m.studies.c.id == sa.bindparam("key"))
_ROWS = sa.select(m.frontier.c.trial_id, sa.type_coerce(m.frontier.c.point, sa.Text)).where(
    m.frontier.c.study_id == sa.bindparam("key")
)


def check(study_id: int, study: str, stored: str | None, rows: list[tuple[int, str]]) -> None:
    """Raises `StoreError` where the frontier (trial id, point's text) is not the one of that checksum; None: there is
    none yet."""
    if stored is not None and members_checksum(study_id, rows) != stored:
        raise damaged(study)


def damaged(study: str) -> StoreError:
    """The refusal of a frontier that is not the stored one."""
    return StoreError(
        f"the frontier of study {study!r} is damaged: its members are not those that were stored; {WAY_OUT}"
    )


def remember(stored: str, ids: frozenset[int]) -> None:
    """These trials are the members whose checksum that is."""
    with _turn:
        _known[stored] = ids
        _known.move_to_end(stored)
        while len(_known) > _KEPT:
            _known.popitem(last=False)


def members(connection: sa.Connection, study_id: int, study: str, stored: str | None) -> frozenset[int] | None:
    """The ids of the trials on a frontier; None where the study has no checksum of them.

    They are read once for each state of the frontier. Raises `StoreError` where they are others.
    """
    if stored is None:
        return None
    if (found := _known.get(stored)) is None:
        rows = [(row[0], row[1]) for row in connection.execute(_ROWS, {"key": study_id})]
        check(study_id, study, stored, rows)
        found = frozenset(trial for trial, _ in rows)
        remember(stored, found)
    return found


def members_of(connection: sa.Connection, study_id: int) -> tuple[str, frozenset[int] | None]:
    """The name of a study, and `members` of it."""
    row = connection.execute(_STORED, {"key": study_id}).one_or_none()
    return ("", None) if row is None else (row.name, members(connection, study_id, row.name, row.members))
