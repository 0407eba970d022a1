"""How commands print: tables, JSON, CSV; and the database that it comes from."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from autoq.documents import to_csv

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoq.reading import Frontier, Reader
    from autoq.store import Store, StudyRecord, TrialRecord


def open_store(db: str) -> Store:
    """The existing database. Raises `NotFound` where there is none."""
    from autoq.store import Store

    return Store.open(db, create=False)


@contextlib.contextmanager
def reading(db: str, server: str | None) -> Iterator[Reader]:
    """Who answers: the server at that URL if there is one, else the existing database."""
    if server is not None:
        from autoq.client import Server

        with Server.open(server) as found:
            yield found
        return
    from autoq.reading import StoreReader

    with open_store(db) as store:
        yield StoreReader(store)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show(parts: Sequence[RenderableType]) -> None:
    """Tables and lines on standard output. What is marked as not to be wrapped is never cut either."""
    from autoq.display.tables import console

    out = console()
    for part in parts:
        out.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))


def derived_summary(study: StudyRecord, parent: TrialRecord, found: TrialRecord, how: str) -> str:
    """Each objective of a trial that was made of another one, beside the other's where they may be compared."""
    from autoq.display.numbers import with_error

    lines = [f"trial {found.number} is trial {parent.number}, {how}"]
    for objective in study.objectives:
        told: list[str] = []
        for part in ("report", "search"):
            old, new = (trial.measurements.get((objective.name, part)) for trial in (parent, found))
            if new is None or (told and old is None):
                continue
            text = with_error(new.value, new.stderr, new.unit)
            if old is not None and old.kind == new.kind:
                text += f", was {with_error(old.value, old.stderr, old.unit)}"
            told.append(f"{text} ({part} part)")
        lines.append(f"  {objective.name}: {'; '.join(told)}")
    return "\n".join(lines) + "\n"


def print_frontier(found: Frontier, as_json: bool, limited: bool = False, as_csv: bool = False) -> None:
    """A frontier on standard output; `limited` says that limits left points out."""
    if as_csv:
        sys.stdout.write(to_csv(found.study, found.points))
        return
    if as_json:
        print_json(found.to_json())
        return
    from autoq.display import tables

    lines = found.hindsight.lines()
    show(tables.frontier(found.study, found.points, found.baselines, tables.console(), limited, found.ties, lines))
