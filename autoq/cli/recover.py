"""The command that trains: a trial becomes another one of the same bytes and better quality."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, INTERRUPTED, Db, Json, StudyArgument, app, examples
from autoq.cli.output import derived_summary, open_store, print_json
from autoq.cli.run import Quiet, terminable
from autoq.documents import named_trial


@app.command(
    epilog=examples(
        "autoq recover demo 23 --steps 200",
        "autoq recover demo uniform-int4 --steps 400 --windows 2",
        "autoq recover demo 23 --steps 100 --tokens 32768 --rate 0.5 --json",
        "autoq recover demo uniform-int3 --how blocks --steps 50",
    )
)
def recover(
    study: StudyArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or a baseline's name.")],
    how: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="model: all layers together, by the model's answers. blocks: one after the other, by what each gives.",
        ),
    ] = "model",
    steps: Annotated[int, typer.Option(metavar="N", help="How many updates of each layer to train for.")] = 200,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Train on at most so many tokens; default: all that are free.")
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of text in each update.")] = 1,
    rate: Annotated[float, typer.Option(metavar="X", help="Times the usual learning rates.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the text.")] = 0,
    db: Db = DEFAULT_DB,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a trial to answer more as the unquantized model does.

    Its integer and codebook layers are trained on text that is in no part of the study; schemes, bytes and kernels stay
    the same. The result is a new trial with measurements of its own. An interrupted training goes on with the same
    command.
    """
    gc.enable()
    from autoq.display.progress import default_observer
    from autoq.search.observer import Observer
    from autoq.search.recovering import Training, recover_trial

    with terminable(), open_store(db) as store:
        record = store.study(study)
        parent = named_trial(store, record, trial)
        training = Training(steps, tokens, windows, rate, seed, how)
        try:
            with contextlib.ExitStack() as stack:
                observer = Observer() if quiet else stack.enter_context(default_observer(record.objectives))
                found = recover_trial(store, record.id, parent.number, training, observer)
        except KeyboardInterrupt:
            sys.stderr.write("autoq: interrupted; the same command goes on with the training\n")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(found.to_json())
    else:
        sys.stdout.write(derived_summary(record, parent, found, "trained"))
