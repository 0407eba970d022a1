"""`autoq report`: a study as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from autoq.cache import write_out
from autoq.cli.app import DEFAULT_DB, Db, Server, StudyArgument, app, examples
from autoq.cli.output import reading


@app.command(
    epilog=examples(
        "autoq report demo --out demo.html", "autoq report demo --out demo.html --server https://autoq.internal"
    )
)
def report(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it; an older one is replaced.")],
    db: Db = DEFAULT_DB,
    server: Server = None,
) -> None:
    """Write a study as one HTML file.

    The frontier, layer maps, sensitivities, how the search went, and how all was measured: pictures with their
    tables. Works without a network.
    """
    from autoq.display import numbers

    with reading(db, server) as reader:
        found = reader.report(study)
    write_out(out, found)
    sys.stderr.write(f"{out}: {numbers.size(len(found))}\n")
