"""The command that measures nothing: sensitivities, and the frontier that they predict."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from autoq.cache import write_out
from autoq.cli.app import DEFAULT_DB, INTERRUPTED, Db, Json, app, examples
from autoq.cli.output import print_json, show
from autoq.cli.run import Assign, Quiet, SpecArgument, terminable
from autoq.errors import BadInput


@app.command(
    epilog=examples(
        "autoq sensitivity demo",
        "autoq sensitivity demo --set data.seed=1 --json",
        "autoq sensitivity studies/my.yaml --out losses.csv",
    )
)
def sensitivity(
    spec: SpecArgument,
    db: Db = DEFAULT_DB,
    assign: Assign = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it to FILE too: .json, or .csv per layer.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Predict what each layer loses under each scheme.

    One pass over the calibration data, no search. What it finds is kept for later searches of the same
    model and data.
    """
    if out is not None and out.suffix not in (".json", ".csv"):
        raise BadInput(f"--out {str(out)!r} must end with .json or .csv")
    if out is not None and not out.parent.is_dir():  # said now, and not after the pass
        raise BadInput(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}")
    from autoq.spec import load_spec

    wanted = load_spec(spec, assign or ())
    gc.enable()
    if not quiet:
        sys.stderr.write(f"checking {wanted.name} against {wanted.model.id} and {wanted.target.name}\n")
    from autoq.display import sensitivity as display
    from autoq.display.progress import default_observer
    from autoq.display.tables import console
    from autoq.search.observer import Observer
    from autoq.search.survey import survey
    from autoq.store import Store

    try:
        with terminable(), Store.open(db) as store, contextlib.ExitStack() as stack:
            observer = Observer() if quiet else stack.enter_context(default_observer())
            found = survey(store, wanted, observer)
    except KeyboardInterrupt:
        sys.stderr.write("autoq: interrupted; what was found is kept, the same command goes on\n")
        raise typer.Exit(INTERRUPTED) from None
    document = found.to_json()
    if out is not None:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n" if out.suffix == ".json" else None
        write_out(out, (text or display.to_csv(found)).encode())
    if as_json:
        print_json(document)
    else:
        show(display.tables(found, console().width))
