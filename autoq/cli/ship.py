"""Commands that ship: export a trial, verify what was exported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, Server, StudyArgument, app, examples
from autoq.cli.output import open_store, print_json, show
from autoq.documents import named_trial

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result and errors.")]
_DOING = {
    "files": "checking files",
    "load": "loading model and data",
    "quantize": "quantizing",
    "write": "writing",
    "evaluate": "evaluating on the report data",
    "time": "timing",
}


def _teller(quiet: bool) -> Callable[[str], None]:
    def tell(what: str) -> None:
        if not quiet:
            sys.stderr.write(f"{_DOING[what]} …\n")

    return tell


@app.command(
    epilog=examples(
        "autoq export demo 23 --out smollm2-small",
        "autoq export demo 23 --target vllm --out smollm2-vllm",
        "autoq export demo uniform-int8 --out smollm2-int8",
    )
)
def export(
    study: StudyArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or a baseline's name.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; must not be there yet.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The runtime to write for; default: the study's."),
    ] = None,
    db: Db = DEFAULT_DB,
    server: Server = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a trial as a checkpoint that its runtime loads.

    The folder also holds a model card, the assignment, and a manifest with the measurements and the
    hash of every file. Check it with `autoq verify DIR`. A server exports and verifies, and the folder is fetched.
    """
    if server is not None:
        from autoq.cli.remote import export_there

        export_there(server, study, trial, out, target, quiet, as_json)
        return
    gc.enable()
    from autoq.shipping.export import export as write

    with open_store(db) as store:
        record = store.study(study)
        # What is no number is looked up among the baselines, whose assignments then are read too.
        chosen = store.trial(record.id, named_trial(store, record, trial).number)
        manifest = write(store, record, chosen, out, target, _teller(quiet))
    if as_json:
        print_json(manifest.model_dump())
        return
    from autoq.display.numbers import size

    sys.stdout.write(
        f"trial {manifest.trial} of {manifest.study} is in {out}: {manifest.written_as}, {size(manifest.size_bytes)}\n"
        f"\n{manifest.run}\n\nhold it against what was measured: autoq verify {out}\n"
    )


@app.command(epilog=examples("autoq verify smollm2-small", "autoq verify smollm2-small --tokens 16384 --json"))
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that autoq export wrote.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the report data to evaluate; default: 4096.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Whether to time it.")] = True,
    db: Db = DEFAULT_DB,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Hold an export against what was measured, in its runtime.

    Bytes, formats, outputs, quality on the report data, latency. Exits with 1 if anything differs
    beyond its tolerance. The database is asked only for a trial that was trained, on a machine that has no copy of it.
    """
    gc.enable()
    from autoq.shipping.verify import REPORT_TOKENS
    from autoq.shipping.verify import verify as check

    def fetch(digests: Iterable[str]) -> Mapping[str, bytes]:
        with open_store(db) as store:
            return store.trained_layers(digests)

    report = check(folder, tokens or REPORT_TOKENS, latency, _teller(quiet), fetch)
    if as_json:
        print_json(report.to_json())
    else:
        from autoq.display import tables

        show(tables.verification(report.checks))
        verdict = "is what was measured" if report.ok else "is NOT what was measured"
        sys.stdout.write(f"{folder} {verdict}\n")
    if not report.ok:
        raise typer.Exit(1)
