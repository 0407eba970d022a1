"""The command that quantizes trials' layers in sequence, for their true inputs: other trials of the same bytes."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, StudyArgument, app, examples
from autoq.cli.output import derived_summary, open_store, print_json
from autoq.cli.run import Quiet, terminable
from autoq.documents import document, named_trial


@app.command(
    epilog=examples(
        "autoq sequential demo 23",
        "autoq sequential demo",
        "autoq sequential demo 23 uniform-int4 --json",
    )
)
def sequential(
    study: StudyArgument,
    trials: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TRIAL",
            help="Numbers of trials, or names of baselines; if none, all of the frontier that are not done yet.",
        ),
    ] = None,
    db: Db = DEFAULT_DB,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize trials once more, block after block.

    Each layer is made for what it reads in the model quantized so far, and makes up for what the layers before it
    changed; schemes, bytes and kernels stay the same. What comes of a trial is a new trial with measurements of its
    own, on the frontier if it is better, and exported like any other.
    """
    gc.enable()
    from autoq.display.progress import default_observer
    from autoq.search.lineage import unsequenced
    from autoq.search.observer import Observer
    from autoq.search.sequencing import is_better, sequence_trials

    with terminable(), open_store(db) as store:
        record = store.study(study)
        if trials:
            numbers = list(dict.fromkeys(named_trial(store, record, trial).number for trial in trials))
        else:
            numbers = unsequenced(store, record.id)
        found, told = [], []
        with contextlib.ExitStack() as stack:
            observer = Observer() if quiet else stack.enter_context(default_observer(record.objectives))
            for trial in sequence_trials(store, record.id, numbers, observer):
                assert trial.parent is not None
                parent = store.trial(record.id, trial.parent)
                found.append(trial)
                told.append(derived_summary(record, parent, trial, "quantized in sequence"))
                if is_better(store, trial) is False:
                    told.append(f"it is no better than trial {parent.number} on the search part: export that one\n")
    if not as_json:
        sys.stdout.write("".join(told))
    elif trials is not None and len(trials) == 1:
        print_json(found[0].to_json())
    else:
        print_json(document(record, found))
