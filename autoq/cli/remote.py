"""Commands that have a server do something: submit, cancel; and what resume and export do with `--server`."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli.app import INTERRUPTED, Json, Server, StudyArgument, app, examples
from autoq.cli.output import print_frontier, print_json
from autoq.errors import AutoQError, BadInput, Unavailable

if TYPE_CHECKING:
    from autoq.client import Server as Client
    from autoq.store import StudySummary

LOOK_SECONDS = 1.0
Assign = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the spec; may be repeated.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it to its end, and print its frontier.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result and errors.")]


def _required(server: str | None) -> str:
    if server is None:
        raise BadInput("which server? give --server URL, or set AUTOQ_SERVER")
    return server


@app.command(
    epilog=examples(
        "autoq submit demo --server https://autoq.internal",
        "autoq submit my.yaml --server http://localhost:8800 --wait",
        "autoq submit my.yaml --set budget.trials=200 --priority -1",
        "autoq submit my.yaml --key nightly-2026-11-26  # sent twice, it is one study",
    )
)
def submit(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or a shipped spec by name: demo, …")],
    server: Server = None,
    name: Annotated[str | None, typer.Option(help="Instead of the spec's name.")] = None,
    assign: Assign = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first; above 0 is for admins.")] = 0,
    key: Annotated[
        str | None, typer.Option(help="A name for this submission: sent again under it, it is still one study.")
    ] = None,
    wait: Wait = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Queue a study on a server.

    The server checks the spec as `autoq search` does. Sent again because a connection broke, it is still one study.
    Paths in a spec are paths on the server.
    """
    from autoq.client import Server as Client
    from autoq.spec import load_spec

    changes = [*(assign or ())] + ([f"name={json.dumps(name)}"] if name is not None else [])
    # What was not said is the server's to choose.
    wanted = load_spec(spec, changes).model_dump(mode="json", exclude_unset=True)
    key = key or uuid.uuid4().hex
    again = f"the same command with --key {key} sends it again, and it is one study"
    with Client.open(_required(server)) as client:
        if not quiet:
            # A server that has loaded no model yet takes seconds for its first check.
            sys.stderr.write(f"{client.url} checks {wanted.get('name', spec)} against its model and target\n")
        try:
            study = client.submit(wanted, priority, key)
        except KeyboardInterrupt:
            sys.stderr.write(f"autoq: interrupted; it may have been queued: {again}\n")
            raise typer.Exit(INTERRUPTED) from None
        except Unavailable as problem:
            raise AutoQError(f"{problem}; it may have been queued: {again}") from None
        sys.stderr.write(f"study {study.name} is {study.state}: {client.url}/studies/{study.name}\n")
        if wait:
            _wait(client, study.name, quiet)
            print_frontier(client.frontier(study.name, {}, {}, with_assignments=as_json), as_json)
        elif as_json:
            print_json(study.to_json())


@app.command(epilog=examples("autoq cancel demo --server https://autoq.internal"))
def cancel(study: StudyArgument, server: Server = None, as_json: Json = False) -> None:
    """End a study on a server.

    At once while it waits, after the trials that are out while it runs. What it has measured stays; `autoq resume`
    goes on with it.
    """
    from autoq.client import Server as Client

    with Client.open(_required(server)) as client:
        found = client.cancel(study)
    if as_json:
        print_json(found.to_json())
    else:
        told = "will end after the trials that are out" if found.state == "running" else f"is {found.state}"
        sys.stdout.write(f"study {found.name} {told}\n")


def resume_there(server: str, study: str, trials: int | None, as_json: bool) -> None:
    """Have a server go on with a study."""
    from autoq.client import Server as Client

    with Client.open(server) as client:
        found = client.resume(study, trials)
    if as_json:
        print_json(found.to_json())
    else:
        sys.stdout.write(f"study {found.name} is {found.state}\n")


def refine_there(
    client: Client, study: str, maximum: Mapping[str, str], minimum: Mapping[str, str], best: str | None, count: int
) -> None:
    """Have a server measure up to `count` offers, and wait for them."""
    queued = client.refine(study, maximum, minimum, best, count)
    sys.stderr.write(f"study {queued.name} is {queued.state}: {client.url}/studies/{queued.name}\n")
    _wait(client, queued.name, quiet=False)


def export_there(
    server: str, study: str, trial: str, out: Path, target: str | None, quiet: bool, as_json: bool
) -> None:
    """Have a server export a trial, and fetch the folder."""
    from autoq.client import Server as Client

    if out.exists() or out.is_symlink():
        raise BadInput(f"--out: {str(out)!r} is there already")
    with Client.open(server) as client:
        found = client.export(study, trial, target)
        told = ""
        while found["state"] in ("queued", "running"):
            stage = (found["progress"] or {}).get("stage") or found["state"]
            if not quiet and stage != told:
                sys.stderr.write(f"{stage} …\n")
            told = stage
            time.sleep(LOOK_SECONDS)
            found = client.exported(found["id"])
        if found["state"] != "finished":
            raise AutoQError(f"the server could not export it: {found['message'] or found['state']}")
        fetch(client.download(found["id"]), out)
    if as_json:
        print_json(found["result"])
        return
    sys.stdout.write(f"trial {found['trial']} of {found['study']} is in {out}\n")
    told = found["result"]["name"]  # the folder's name on the server; here it has another
    for line in found["result"]["lines"]:
        sys.stdout.write(f"\n{line['title']}\n{line['text'].replace(told, str(out))}\n")


class _Pieces:
    """Bytes that come in pieces, as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end only."""
        parts, missing = [self._left], size - len(self._left)
        while missing > 0 and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            missing -= len(piece)
        text = b"".join(parts)
        self._left = text[size:]
        return text[:size]


def fetch(pieces: Iterator[bytes], out: Path) -> None:
    """Unpack a server's tar file into the new folder `out`, which is there whole or not at all.

    Nothing leaves the folder, whatever the names in the file are: links, absolute paths and `..` are refused (Python's
    filter `data`). Raises `AutoQError`.
    """
    from autoq.shipping.manifest import MANIFEST

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        stream: Any = _Pieces(pieces)
        file: IO[bytes] = stream
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for entry in archive:
                if entry.isfile() or entry.isdir():
                    archive.extract(entry, scratch, filter="data")
        folders = [path.parent for path in scratch.rglob(MANIFEST)]
        if len(folders) != 1:
            raise AutoQError("what the server sent is no export of AutoQ")
        folders[0].rename(out)
    except (tarfile.TarError, OSError) as problem:
        raise AutoQError(f"what the server sent cannot be unpacked: {problem}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _wait(client: Client, name: str, quiet: bool) -> None:
    """Until a study has ended. Raises `AutoQError` where it ended otherwise than finished."""
    gc.enable()
    try:
        left = _followed(client, name, quiet)
    except KeyboardInterrupt:
        sys.stderr.write(f"autoq: the study goes on there; look: autoq frontier {name} --server {client.url}\n")
        raise typer.Exit(INTERRUPTED) from None
    if left.state != "finished":
        raise AutoQError(f"study {name} is {left.state}: {left.message or 'no reason is known'}")


def _followed(client: Client, name: str, quiet: bool) -> StudySummary:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from autoq.display.tables import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    budget = client.study(name).study_spec().budget.trials
    with Progress(*columns, console=console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(name, total=budget)
        while True:
            found = client.summary(name)
            done = found.complete + found.stopped + found.failed
            progress.update(
                task, completed=done, description=f"{name}: {found.state}, {found.frontier} on the frontier"
            )
            if found.state not in ("queued", "running", "created"):
                return found
            time.sleep(LOOK_SECONDS)
