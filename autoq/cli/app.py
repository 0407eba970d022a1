"""The application that the commands hang on: errors, exit codes, and the options that many share."""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer
from typer.core import TyperGroup

from autoq.errors import AutoQError

INTERRUPTED = 130
_WORDS = {
    "Value error, ": "",
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
}


# From a search to what is shipped, then the server, then what there is.
ORDER = (
    *("plan", "search", "resume", "sensitivity", "studies", "trials", "frontier", "pick", "diff", "report"),
    *("recover", "sequential", "export", "verify", "serve", "token", "submit", "cancel", "remove"),
    *("methods", "targets", "objectives", "samplers", "doctor", "copy"),
)
_LONG = ("search", "resume", "recover", "sequential", "serve")


class _Group(TyperGroup):
    """The commands in the order of `ORDER`, with every error as one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. One that says nothing by itself when it is interrupted ends with a word all the same."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write("autoq: interrupted\n")
            raise typer.Exit(INTERRUPTED) from None

    def main(self, args: Sequence[str] | None = None, *other: Any, **extra: Any) -> NoReturn:
        """Run a command line (default: this process's own) and exit."""
        arguments, debug = _take_debug(list(sys.argv[1:] if args is None else args))
        extra["standalone_mode"] = False
        _warn_of_passwords(arguments)
        try:
            code = super().main(arguments or ["--help"], *other, **extra)
            sys.stdout.flush()
        except AutoQError as problem:
            _complain(str(problem), debug)
            sys.exit(problem.exit_code)
        except typer.TyperException as problem:
            context = getattr(problem, "ctx", None)
            hint = f"; see {context.command_path} --help" if context else ""
            _complain(_plain(problem, arguments) + hint, debug)
            sys.exit(problem.exit_code)
        except typer.Abort:
            sys.stderr.write("autoq: interrupted\n")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read this has read enough. Python would complain once more when it closes the stream.
            sys.stdout = None
            sys.exit(1)
        except Exception as problem:
            lines = str(problem).splitlines() or [""]
            _complain(f"internal error: {type(problem).__name__}: {lines[0]}; --debug shows the traceback", debug)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was there (what follows `--` is not ours)."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*options, *arguments[end:]], len(options) < end


def _warn_of_passwords(arguments: Sequence[str]) -> None:
    """Say, where a command runs for long, that a password on its line is read by whoever lists the processes."""
    if not arguments or arguments[0] not in _LONG:
        return
    url = _value_of("--db", arguments)
    try:
        password = urlsplit(url).password if url is not None and "://" in url else None
    except ValueError:
        return  # it is refused where it is used
    if password:
        sys.stderr.write("autoq: everybody on this machine can read the password in --db; give the URL in AUTOQ_DB\n")


def _plain(problem: typer.TyperException, arguments: Sequence[str]) -> str:
    """What the parser complains of in the words of all other messages: with the value, and no library's phrases."""
    line = " ".join(problem.format_message().split()).rstrip(".")
    worded = line
    for theirs, ours in _WORDS.items():
        worded = worded.replace(theirs, ours)
    options = getattr(getattr(problem, "param", None), "opts", ())
    value = next(filter(None, (_value_of(option, arguments) for option in options)), None)
    return worded if worded == line or value is None else f"{worded} (got {value[:80]!r})"


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What follows an option on the line."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _complain(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    # What a file or a server said may stand in it, and must not move the cursor or set the terminal's title.
    shown = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in line)
    sys.stderr.write(f"autoq: {shown}\n")


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from autoq import __version__

        typer.echo(f"autoq {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: autoq search demo")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """AutoQ finds per-layer quantization assignments that no other assignment beats: smaller, faster, or
    more accurate, measured on the runtime that you deploy to."""


Db = Annotated[
    str,
    typer.Option("--db", envvar="AUTOQ_DB", metavar="URL", help="Database: a path (SQLite) or any SQLAlchemy URL."),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="AUTOQ_SERVER",
        metavar="URL",
        help="Ask a server instead of a database; its token comes from AUTOQ_TOKEN or AUTOQ_TOKEN_FILE.",
    ),
]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name or id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DEFAULT_DB = "autoq.db"


def examples(*lines: str) -> str:
    """An epilog of example command lines, which keeps its line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def main() -> NoReturn:
    """The entry point of the `autoq` command."""
    # A query is over before collecting garbage pays: without it, its imports take a seventh less time.
    # What runs for longer than a moment switches it on again, a study once its imports are over.
    gc.disable()
    try:
        app()
    finally:
        # All is said and stored; what is left is Python's own end, seconds with torch, free to be cut short.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise AssertionError("the group exits by itself")
