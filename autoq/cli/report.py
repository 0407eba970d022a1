"""`autoq report`: a study as one HTML file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, StudyArgument, app, examples
from autoq.cli.output import open_store


@app.command(epilog=examples("autoq report demo --out demo.html", "autoq report demo --out demo.html --db runs.db"))
def report(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it; an older one is replaced.")],
    db: Db = DEFAULT_DB,
) -> None:
    """Write a study as one HTML file.

    The frontier, layer maps, sensitivities, how the search went, and how all was measured: pictures with their
    tables. Works without a network.
    """
    from autoq.display import numbers

    reports = importlib.import_module("autoq.dashboards.report")

    with open_store(db) as store:
        size = reports.write(store, store.study(study).id, out)
    sys.stderr.write(f"{out}: {numbers.size(size)}\n")
