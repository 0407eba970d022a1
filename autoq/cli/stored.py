"""Commands that only read: studies, trials, frontier, pick, diff, what there is, doctor and copy."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from autoq import documents
from autoq.cli.app import DEFAULT_DB, Db, Json, Server, StudyArgument, app, examples
from autoq.cli.output import open_store, print_frontier, print_json, reading, show
from autoq.documents import document, pairs
from autoq.errors import BadInput

Maximum = Annotated[
    list[str] | None, typer.Option("--max", metavar="OBJECTIVE=VALUE", help="Upper limit; may be repeated.")
]
Minimum = Annotated[
    list[str] | None, typer.Option("--min", metavar="OBJECTIVE=VALUE", help="Lower limit; may be repeated.")
]


class TrialStateName(StrEnum):
    """How a trial stands."""

    running = "running"
    complete = "complete"
    stopped = "stopped"
    failed = "failed"
    duplicate = "duplicate"


@app.command(epilog=examples("autoq studies", "autoq studies --json --db runs.db"))
def studies(db: Db = DEFAULT_DB, server: Server = None, as_json: Json = False) -> None:
    """List the studies of a database or a server."""
    with reading(db, server) as reader:
        found = reader.studies()
    if as_json:
        print_json({"studies": [summary.to_json() | seen.to_json() for summary, seen in found]})
        return
    from autoq.display import tables

    views = {summary.name: seen.sampler_view for summary, seen in found}
    show([*tables.studies([summary for summary, _ in found]), *tables.sampler_views(views)])


@app.command(epilog=examples("autoq trials demo", "autoq trials demo --state failed", "autoq trials demo --limit 10"))
def trials(
    study: StudyArgument,
    db: Db = DEFAULT_DB,
    state: Annotated[TrialStateName | None, typer.Option(help="Only trials in this state.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the first ones.")] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """List the trials of a study in the order of their numbers."""
    with reading(db, server) as reader:
        record = reader.study(study)
        states = None if state is None else (state.value,)
        found = reader.trials(study, states, limit, with_assignments=as_json)  # type: ignore[arg-type]
    if as_json:
        print_json(document(record, found))
        return
    from autoq.display import tables

    show(tables.trials(record, found, tables.console()))


@app.command(
    epilog=examples("autoq frontier demo", "autoq frontier demo --max size_bytes=120MB", "autoq frontier demo --csv")
)
def frontier(
    study: StudyArgument,
    db: Db = DEFAULT_DB,
    maximum: Maximum = None,
    minimum: Minimum = None,
    server: Server = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Show the trials that no other one beats.

    Uniform baselines stand beside them, those too that the frontier beats.

    Values are those of the report data where there are any. With limits, only trials within them.
    """
    if as_json and as_csv:
        raise BadInput("give either --json or --csv, not both")
    upper, lower = pairs(maximum or (), "--max"), pairs(minimum or (), "--min")
    with reading(db, server) as reader:
        found = reader.frontier(study, upper, lower, with_assignments=as_json)
    print_frontier(found, as_json, bool(upper or lower), as_csv)


@app.command(
    epilog=examples(
        "autoq pick demo --max size_bytes=90MB --best kl_nats_per_token",
        "autoq pick demo --max latency_decode_ms=12 --json",
        "autoq pick demo --max size_bytes=90MB --refine 3",
    )
)
def pick(
    study: StudyArgument,
    db: Db = DEFAULT_DB,
    maximum: Maximum = None,
    minimum: Minimum = None,
    best: Annotated[
        str | None, typer.Option(metavar="OBJECTIVE", help="What to be best in; default: the study's first objective.")
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="First measure up to N assignments that the study's model offers here."),
    ] = None,
    server: Server = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML (the default).")] = False,
    as_json: Json = False,
) -> None:
    """Pick the best trial within limits.

    Prints the frontier's best one, with its measurements and its assignment. Says what it is no better
    than beyond noise, and what the study's model predicts for limits that it leaves a gap to.
    """
    if as_json and as_yaml:
        raise BadInput("give either --json or --yaml, not both")
    upper, lower = pairs(maximum or (), "--max"), pairs(minimum or (), "--min")
    if refine is not None and not (upper or lower):
        raise BadInput("--refine needs a limit to refine at: give --max or --min")
    from autoq.cli import picking
    from autoq.study import bounds

    if server is not None:
        from autoq.cli.remote import refine_there
        from autoq.client import Server as Client

        with Client.open(server) as client:
            if refine is not None:
                refine_there(client, study, upper, lower, best, refine)
            found = picking.picked_there(client, study, upper, lower, best)
    else:
        with open_store(db) as store:
            record = store.study(study)
            if refine is not None:
                picking.refine(store, record, bounds(record, upper, lower), best, refine)
            found = picking.picked(store, record, upper, lower, best)
    if as_json:
        print_json(found)
        return
    import yaml

    # The offer comes last: its assignment is not the one that was picked.
    wanted = ("study", "number", "baseline", "parent", "hash", "measurements", "no_better_than", "assignment", "offer")
    kept = {key: found[key] for key in wanted if found.get(key)}
    for measurement in kept["measurements"].values():
        del measurement["detail"]
    sys.stdout.write(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000))


@app.command(epilog=examples("autoq diff demo 12 31", "autoq diff demo uniform-int4 31 --json"))
def diff(
    study: StudyArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="A trial's number, or a baseline's name.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    db: Db = DEFAULT_DB,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show the layers and KV caches that differ between two trials.

    And what the difference costs in bytes and in every objective.
    """
    from autoq.display import diff as display

    with reading(db, server) as reader:
        found = reader.diff(study, a, b)
    if as_json:
        print_json(found)
    else:
        show(display.table(found))


def _offered(what: str, server: str | None) -> list[dict[str, Any]]:
    """What there is to choose from here, or on a server."""
    if server is None:
        return documents.offered(what)
    with reading("", server) as reader:
        return reader.offered(what)


def _print_choices(what: str, server: str | None, as_json: bool) -> None:
    found = _offered(what, server)
    if as_json:
        print_json({what: found})
        return
    from autoq.display import tables

    show(tables.choices([(choice["name"], choice["summary"]) for choice in found], what.removesuffix("s")))


@app.command(epilog=examples("autoq methods", "autoq methods --json"))
def methods(server: Server = None, as_json: Json = False) -> None:
    """List the quantization methods.

    And how KV caches are quantized, which is no method: it knows no weights.
    """
    _print_choices("methods", server, as_json)


@app.command(epilog=examples("autoq targets"))
def targets(server: Server = None, as_json: Json = False) -> None:
    """List the deployment runtimes.

    What each one times, what it exports, and whether it can measure on this machine, or on the server's.
    """
    found = _offered("targets", server)
    if as_json:
        print_json({"targets": found})
        return
    from autoq.display import tables

    show(tables.targets(found))


@app.command(epilog=examples("autoq objectives"))
def objectives(server: Server = None, as_json: Json = False) -> None:
    """List what can be measured."""
    _print_choices("objectives", server, as_json)


@app.command(epilog=examples("autoq samplers"))
def samplers(server: Server = None, as_json: Json = False) -> None:
    """List what can propose assignments."""
    _print_choices("samplers", server, as_json)


@app.command(epilog=examples("autoq doctor", "autoq doctor --json"))
def doctor(db: Db = DEFAULT_DB, as_json: Json = False) -> None:
    """Show what is installed and usable here.

    Versions, processor, targets, folders, database. Exits with 1 if something must be repaired.
    """
    from autoq.doctor import examine

    findings = examine(db)
    if as_json:
        print_json({"findings": [vars(finding) for finding in findings]})
    else:
        section = ""
        for finding in findings:
            if finding.section != section:
                sys.stdout.write(f"{'' if not section else chr(10)}{finding.section}\n")
                section = finding.section
            sign = {True: "ok", None: "--", False: "!!"}[finding.ok]
            sys.stdout.write(f"  {sign}  {finding.name:<18}  {finding.value}\n")
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "autoq copy backup.db",
        "autoq copy postgresql+psycopg://autoq@db.internal/autoq --db autoq.db",
        "autoq copy shared.db demo quick",
        "autoq copy whole.db --db damaged.db --rescue",
    )
)
def copy(
    target: Annotated[str, typer.Argument(metavar="TO", help="Where to: a path (SQLite) or any SQLAlchemy URL.")],
    studies: Annotated[
        list[str] | None, typer.Argument(metavar="[STUDY]...", help="Only these, by name or id.")
    ] = None,
    db: Db = DEFAULT_DB,
    rescue: Annotated[bool, typer.Option("--rescue", help="Copy what is whole of a damaged database.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a database, or some of its studies, to another one.

    As a backup, also while studies run; from SQLite to PostgreSQL and back; to rescue what is whole.
    Everything is held against its checksums on the way. Without studies the target must have none.
    """
    from autoq.display.numbers import counted
    from autoq.store import copying

    with open_store(db) as source, copying.opened_target(target) as opened:
        done = copying.copy(source, opened, studies or (), rescue)
        where = opened.url
    for line in done.left_out:
        sys.stderr.write(f"left out: {line}\n")
    if as_json:
        print_json({"studies": done.studies, "trials": done.trials, "left_out": done.left_out})
        return
    of = ", ".join(done.studies) if len(done.studies) <= 3 else f"{len(done.studies)} studies"
    sys.stdout.write(f"copied {counted(done.trials, 'trial')} of {of or 'no study'} to {where!r}\n")
