"""The command that quantizes a trial's layers in sequence, for their true inputs: another trial of the same bytes."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, StudyArgument, app, examples
from autoq.cli.output import derived_summary, open_store, print_json
from autoq.cli.run import Quiet, terminable
from autoq.documents import named_trial


@app.command(epilog=examples("autoq sequential demo 23", "autoq sequential demo uniform-int4 --json"))
def sequential(
    study: StudyArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or a baseline's name.")],
    db: Db = DEFAULT_DB,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a trial once more, block after block.

    Each layer is made for what it reads in the model quantized so far, and makes up for what the layers before it
    changed; schemes, bytes and kernels stay the same. The result is a new trial with measurements of its own, to be
    exported like any other.
    """
    gc.enable()
    from autoq.display.progress import default_observer
    from autoq.search.observer import Observer
    from autoq.search.sequencing import is_better, sequence_trial

    with terminable(), open_store(db) as store:
        record = store.study(study)
        parent = named_trial(store, record, trial)
        with contextlib.ExitStack() as stack:
            observer = Observer() if quiet else stack.enter_context(default_observer(record.objectives))
            found = sequence_trial(store, record.id, parent.number, observer)
        better = is_better(store, found)
    if as_json:
        print_json(found.to_json())
        return
    sys.stdout.write(derived_summary(record, parent, found, "quantized in sequence"))
    if better is False:
        sys.stdout.write(f"it is no better than trial {parent.number} on the search part: export that one\n")
