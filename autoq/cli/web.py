"""Commands of the server: serve, and the tokens of those who may use it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sys
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli.app import DEFAULT_DB, Db, Json, Server, app, examples
from autoq.cli.output import open_store, print_json, reading, show
from autoq.cli.run import ExecutorName
from autoq.errors import AutoQError, BadInput


@app.command(
    epilog=examples(
        "autoq serve",
        "autoq serve --db postgresql+psycopg://host/autoq --slots 2",
        "autoq serve --cluster ray://head:10001 --places 64",
        "autoq serve --host 0.0.0.0 --allow-host autoq.example.org --tls-terminated",
    )
)
def serve(
    db: Db = DEFAULT_DB,
    host: Annotated[str, typer.Option(help="Where to listen; other machines reach all but 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8800,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name that requests may call it by; may be repeated.")
    ] = None,
    tls_terminated: Annotated[
        bool, typer.Option("--tls-terminated", help="A proxy on this machine has TLS and passes requests on.")
    ] = False,
    ssl_certfile: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS by the server itself.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key.")] = None,
    root_path: Annotated[str, typer.Option(metavar="PATH", help="Where the proxy has put it, such as /autoq.")] = "",
    models: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of models that users may name; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of texts that users may name; may be repeated.")
    ] = None,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Users may name models and datasets on the hub.")
    ] = False,
    slots: Annotated[int, typer.Option(min=0, help="Studies that run at a time; 0 only shows what is stored.")] = 1,
    cpus: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of each study.")] = None,
    executor: Annotated[
        ExecutorName, typer.Option(help="What users' studies may run on; with ray, up to --slots workers each.")
    ] = ExecutorName.local,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster that users' studies may name as their workers' address."),
    ] = None,
    places: Annotated[
        int | None, typer.Option(min=1, help="Workers of studies on a cluster at a time; default: as many as --slots.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where logs and exports are kept; default: in AutoQ's cache.")
    ] = None,
) -> None:
    """Serve the API and the dashboard, and run what is submitted.

    On this machine nobody needs a token until there is one. Other machines are let in with tokens only.
    """
    gc.enable()
    from autoq.service.app import create_app
    from autoq.service.backroom import Backroom
    from autoq.service.scheduler import Scheduler
    from autoq.service.serving import Certificate, listen, refuse_exposed, run
    from autoq.service.settings import Settings, Sources
    from autoq.spec_units import parse_address
    from autoq.store import Store

    if ssl_keyfile is not None and ssl_certfile is None:
        raise BadInput("--ssl-keyfile needs --ssl-certfile")
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        raise BadInput(f"--root-path {root_path!r} must begin with / and not end with one")
    for option, roots in (("--models", models), ("--data", data)):
        for root in roots or ():
            if not root.is_dir():
                raise BadInput(f"{option}: there is no folder {str(root)!r}")
    if places is not None and cluster is None:
        raise BadInput(f"--places {places} are of a Ray cluster; name it with --cluster")
    if cluster not in (None, "auto"):
        try:
            parse_address(str(cluster))
        except ValueError as problem:
            raise BadInput(f"--cluster {cluster!r} {problem}") from None
    certificate = None if ssl_certfile is None else Certificate(ssl_certfile, ssl_keyfile)
    workers = slots if executor is ExecutorName.ray else 0
    sources = Sources(
        tuple(models or ()), tuple(data or ()), allow_hub, workers, cluster, 0 if cluster is None else places or slots
    )
    settings = Settings(
        host=host,
        port=port,
        hosts=tuple(allow_host or ()),
        tls=tls_terminated or certificate is not None,
        root_path=root_path,
        sources=sources,
    )
    with Store.open(db) as store:
        for warning in refuse_exposed(store, settings):
            sys.stderr.write(f"autoq: {warning}\n")
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(listen(host, port))
            scheduler = Scheduler(store, slots, places=places, cpus=cpus, folder=folder) if slots else None
            backroom = Backroom(store.address) if slots else None
            settings = dataclasses.replace(
                settings,
                port=listening.getsockname()[1],
                exports=None if scheduler is None else scheduler.exporter.folder,
            )
            scheme = "https" if certificate is not None else "http"

            def up() -> None:
                sys.stdout.write(f"AutoQ serves {store.url} at {scheme}{settings.url.removeprefix('http')}\n")
                sys.stdout.flush()
                if backroom is not None:
                    backroom.start()  # which takes processor time that the first answers need

            if backroom is not None:
                stack.callback(backroom.stop)
            if scheduler is not None:
                stack.callback(scheduler.stop)
                scheduler.start()
            run(create_app(store, settings, backroom, scheduler), listening, up, certificate, tls_terminated)


class RoleName(StrEnum):
    """What a token allows."""

    viewer = "viewer"
    submitter = "submitter"
    admin = "admin"


token = typer.Typer(
    rich_markup_mode=None,
    help="Make, list and revoke tokens.",
    no_args_is_help=True,
    epilog=examples(
        "autoq token create laptop --user ada --role submitter", "autoq token list", "autoq token revoke 3"
    ),
)
app.add_typer(token, name="token")


@token.command(
    "create",
    epilog=examples(
        "autoq token create laptop --user ada --role submitter --expires 90d",
        "autoq token create grafana --user ops --role viewer",
    ),
)
def create_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for, such as the machine that has it.")],
    user: Annotated[str, typer.Option(help="Whose studies it sees and makes.")],
    role: Annotated[RoleName, typer.Option(help="viewer reads, submitter submits, admin does all for all users.")],
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="After how long, such as 90d.")] = None,
    db: Db = DEFAULT_DB,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it, this once: the database has only its hash.

    Whoever serves this database asks everybody for a token from now on.
    """
    from autoq.client import Server as Client
    from autoq.spec_units import parse_seconds
    from autoq.store import Store

    lasting = None
    if expires is not None:
        try:
            seconds = parse_seconds(expires)
        except ValueError as problem:
            raise BadInput(f"--expires {problem} (got {expires[:80]!r})") from None
        if not 0 < seconds <= 100 * 365 * 86400 or not math.isfinite(seconds):
            raise BadInput(f"--expires must be more than nothing and at most 100 years (got {expires[:80]!r})")
        lasting = timedelta(seconds=seconds)
    if server is not None:
        with Client.open(server) as client:
            days = None if lasting is None else lasting / timedelta(days=1)
            made = client.create_token(name, user, role.value, days)
    else:
        with Store.open(db) as store:
            secret, record = store.accounts.create(name, user, role.value, lasting)
        made = record.to_json() | {"token": secret}
    if as_json:
        print_json(made)
        return
    until = f"until {_cell(made['expires_at'])} UTC" if made["expires_at"] else "until it is revoked"
    sys.stderr.write(f"token {made['id']} of {user} ({role.value}), valid {until}; it is shown this once:\n")
    sys.stdout.write(f"{made['token']}\n")


@token.command("list", epilog=examples("autoq token list", "autoq token list --json"))
def list_tokens(db: Db = DEFAULT_DB, server: Server = None, as_json: Json = False) -> None:
    """List all tokens, those too that open nothing any more."""
    with reading(db, server) as reader:
        found = reader.tokens()
    if as_json:
        print_json({"tokens": found})
        return
    from autoq.display.tables import plain

    columns = ["id", "name", "user", "role", "valid", "expires_at", "used_at"]
    rows = [[_cell(record[column]) for column in columns] for record in found]
    show([plain([column.removesuffix("_at") for column in columns], rows)])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "" if value is None else str(value)
    return text[:16].replace("T", " ") if "T" in text and text.endswith("+00:00") else text


@token.command("revoke", epilog=examples("autoq token revoke 3"))
def revoke_token(
    token_id: Annotated[int, typer.Argument(metavar="ID", min=0, help="As `autoq token list` shows it.")],
    db: Db = DEFAULT_DB,
    server: Server = None,
) -> None:
    """Let a token open nothing from now on, its sessions in browsers neither."""
    if token_id >= 2**31:
        raise AutoQError(f"no token with id {token_id}")
    if server is not None:
        from autoq.client import Server as Client

        with Client.open(server) as client:
            gone = client.revoke_token(token_id)
    else:
        with open_store(db) as store:
            gone = store.accounts.revoke(token_id).to_json()
    sys.stdout.write(f"token {gone['id']} ({gone['name']}) of {gone['user']} is revoked\n")
