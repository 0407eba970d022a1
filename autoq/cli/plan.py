"""The command that runs nothing: what a study would cost."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, app, examples
from autoq.cli.output import open_store, print_json, show
from autoq.cli.run import Assign, Quiet, SpecArgument
from autoq.errors import NotFound


@app.command(
    epilog=examples(
        "autoq plan demo",
        "autoq plan demo --trials 200 --against demo",
        "autoq plan studies/my.yaml --workers 8 --json",
    )
)
def plan(
    spec: SpecArgument,
    db: Db = DEFAULT_DB,
    workers: Annotated[int | None, typer.Option(help="On so many Ray workers instead of the spec's.")] = None,
    trials: Annotated[int | None, typer.Option(help="Instead of the spec's budget.trials.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY",
            help="Take seconds from this study's trials; default: the last one that fits, if there is one.",
        ),
    ] = None,
    assign: Assign = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Predict what a study takes: time, disk, memory.

    Reads the model's shapes and no weights, tries a few operations here, and writes nothing. Each number says what it
    rests on: on trials that a study in the database measured, on what was tried, or on a rate that is assumed.
    """
    from autoq.spec import load_spec

    changes = [*(assign or ())]
    if workers is not None:
        changes += [*(["workers.executor=ray"] if workers != 1 else []), f"workers.count={workers}"]
    changes += [f"budget.trials={trials}"] if trials is not None else []
    wanted = load_spec(spec, changes)
    if not quiet:
        sys.stderr.write(f"checking {wanted.name} against {wanted.model.id} and {wanted.target.name}\n")
    from autoq.search.costing import predict

    try:
        store = open_store(db)
    except NotFound:
        if against is not None:
            raise
        found = predict(wanted)
    else:
        with store:
            found = predict(wanted, store, against)
    if as_json:
        print_json(found.to_json())
        return
    from autoq.display.study_cost import tables

    show(tables(found))
