"""The command that takes a study away for good."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, Server, StudyArgument, app, examples
from autoq.cli.output import open_store, print_json, reading
from autoq.errors import AutoQError, BadInput


@app.command(epilog=examples("autoq remove demo", "autoq remove demo --yes --server https://autoq.internal"))
def remove(
    study: StudyArgument,
    db: Db = DEFAULT_DB,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Remove a study with all its trials, for good.

    One that is queued or at work is refused. The bank and what studies share stay, and so does what was exported to
    a folder of yours. A report (`autoq report`) is a way to keep the numbers.
    """
    from autoq.display.numbers import counted

    with reading(db, server) as reader:
        there = reader.summary(study)
    count = there.running + there.complete + there.stopped + there.failed + there.duplicate
    what = f"study {there.name!r} with {counted(count, 'trial')}"
    if not yes:
        if not sys.stdin.isatty():
            raise BadInput(f"this removes {what} for good; say so with --yes")
        if not typer.confirm(f"Remove {what} for good?", err=True):
            raise AutoQError(f"{what} was not removed")
    if server is not None:
        from autoq.client import Server as Client

        with Client.open(server) as client:
            told = client.remove(there.name)
    else:
        with open_store(db) as store:
            told = store.queue.remove(there.id).to_json()
    if as_json:
        print_json(told)
    else:
        sys.stdout.write(f"{what} is removed\n")
