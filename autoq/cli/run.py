"""Commands that run a study: search, resume."""

from __future__ import annotations

import _thread
import contextlib
import gc
import json
import signal
import sys
import threading
from collections.abc import Iterator
from enum import StrEnum
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from autoq.cli.app import DEFAULT_DB, INTERRUPTED, Db, Json, Server, StudyArgument, app, examples
from autoq.cli.output import open_store, print_frontier
from autoq.reading import StoreReader

if TYPE_CHECKING:
    from autoq.search.executors import Executor
    from autoq.spec import StudySpec
    from autoq.store import Store


class ExecutorName(StrEnum):
    """Who evaluates."""

    local = "local"
    ray = "ray"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result and errors.")]
SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or a shipped spec by name: demo, …")]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the spec; may be repeated."),
]


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: the study is left resumable. A second one ends at once.

    Python drops an interrupt that arrives in a destructor or in a callback of the garbage collector:
    it is raised again once that is over.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, former)
        raise KeyboardInterrupt

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            threading.Timer(0.02, _thread.interrupt_main).start()
        else:
            hook(dropped)

    former, hook = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, former)


def _executor(spec: StudySpec) -> Executor:
    """The study's executor; from here on garbage is collected.

    By now torch and transformers are imported, which leaves next to no garbage; looking for it all along takes a tenth
    of the seconds. What imports made stays to the end, so it is not looked through later either.
    """
    from autoq.search.executors import make_executor

    if not gc.isenabled():  # `main` switched it off: the process is ours
        gc.freeze()
        gc.enable()
    return make_executor(spec)


def _run(store: Store, study_id: int, db: str, quiet: bool, as_json: bool) -> None:
    from autoq.display.progress import default_observer
    from autoq.search.controller import run_study
    from autoq.search.observer import Observer

    study = store.study(study_id)
    where = "" if db == DEFAULT_DB else f" --db {store.url}"
    try:
        with contextlib.ExitStack() as stack:
            observer = Observer() if quiet else stack.enter_context(default_observer(study.objectives))
            run_study(store, study_id, observer, _executor)
    except KeyboardInterrupt:
        sys.stderr.write(f"autoq: interrupted; go on with: autoq resume {study.name}{where}\n")
        raise typer.Exit(INTERRUPTED) from None
    left = store.study(study_id)
    if left.state != "finished":
        sys.stderr.write(f"study {left.name} was asked to stop and is {left.state}\n")
    print_frontier(StoreReader(store).frontier(left.name, {}, {}, with_assignments=as_json), as_json)
    if left.state == "finished" and not quiet and not as_json:
        name = f"{left.name} TRIAL{where}"
        sys.stderr.write(f"better at the same bytes: autoq sequential {name}; ship it: autoq export {name} --out DIR\n")


@app.command(
    epilog=examples(
        "autoq search demo",
        "autoq search studies/my.yaml --trials 200 --name second-try",
        "autoq search demo --set sampler.seed=1 --set budget.wall_time=10m",
        "autoq search demo --seed-from ./exported --seed-from quantize_config.json",
        "autoq search cluster --workers 8 --db postgresql+psycopg://host/autoq",
    )
)
def search(
    spec: SpecArgument,
    db: Db = DEFAULT_DB,
    executor: Annotated[ExecutorName | None, typer.Option(help="Instead of the spec's workers.executor.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of the spec's workers.count.")] = None,
    trials: Annotated[int | None, typer.Option(help="Instead of the spec's budget.trials.")] = None,
    name: Annotated[str | None, typer.Option(help="Instead of the spec's name.")] = None,
    assign: Assign = None,
    seed_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Try an assignment made elsewhere first: an export, a GGUF file, a tool's recipe; may be repeated.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a study here and show its frontier.

    The spec is checked against the model and the target before any weight is loaded. Every finished
    trial is stored, so an interrupted study goes on with `autoq resume`.
    """
    from autoq.spec import load_spec

    changes = [*(assign or ())]
    changes += [f"workers.executor={executor.value}"] if executor is not None else []
    changes += [f"workers.count={workers}"] if workers is not None else []
    changes += [f"budget.trials={trials}"] if trials is not None else []
    changes += [f"name={json.dumps(name)}"] if name is not None else []
    wanted = load_spec(spec, changes)
    wanted = wanted.model_copy(update={"recipes": (*wanted.recipes, *(seed_from or ()))})
    if not quiet:
        # What comes next imports the model's library, which takes seconds.
        sys.stderr.write(f"checking {wanted.name} against {wanted.model.id} and {wanted.target.name}\n")

    from autoq.search.controller import create_study
    from autoq.store import Store

    with terminable(), Store.open(db) as store:
        study = create_study(store, wanted)
        if study.name != wanted.name:  # said to the quiet too, who would take the other one's results for these
            sys.stderr.write(f"the name {wanted.name} is taken; this study is {study.name}\n")
        _run(store, study.id, db, quiet, as_json)


@app.command(epilog=examples("autoq resume demo", "autoq resume demo --trials 96", "autoq resume 3 --quiet --json"))
def resume(
    study: StudyArgument,
    db: Db = DEFAULT_DB,
    trials: Annotated[
        int | None, typer.Option(help="A new budget of so many trials in all; goes on with a finished study too.")
    ] = None,
    server: Server = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with a study that was interrupted, or to more trials.

    Nothing that was measured is measured again, and the proposals are those of a run without a break. On a server
    the study is queued again.
    """
    if server is not None:
        from autoq.cli.remote import resume_there

        resume_there(server, study, trials, as_json)
        return
    from autoq.search.holding import refuse_busy

    with terminable(), open_store(db) as store:
        record = store.study(study)
        refuse_busy(store, record.id)
        if trials is not None:
            from autoq.search.controller import raise_budget

            raise_budget(store, record.id, trials)
        elif record.state == "finished":
            sys.stderr.write(f"study {record.name} is finished\n")
            print_frontier(StoreReader(store).frontier(record.name, {}, {}, with_assignments=as_json), as_json)
            return
        if record.state == "running":
            sys.stderr.write(f"study {record.name} did not end properly\n")
        _run(store, record.id, db, quiet, as_json)
