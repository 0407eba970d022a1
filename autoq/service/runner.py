"""The process that runs one study of the queue.

    AUTOQ_DB=… python -m autoq.service.runner STUDY_ID

It takes the study's lease, so that whoever starts a second one finds it busy, and does what the table `job` says:

    {"kind": "run"}                                                       to the end of the budget
    {"kind": "refine", "max": {…}, "min": {…}, "n": 2, "best": …}         offers of the model become trials
    {"kind": "sequential", "trial": 23}                                   a trial is quantized once more, in sequence
    {"kind": "recover", "trial": 23, "training": {"steps": 200, …}}       a trial is trained

What it is asked to (`cancel`, `yield`) is heard between trials; SIGTERM has the study wait again. It ends with 0 when
the study stands at what is recorded of it, with 1 where that is a failure, and with `BUSY` where another process runs
the study. Any other end is a crash, which its starter records. What it says goes to standard error, the study's log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from autoq.errors import AutoQError, LeaseLost, Stopped, StudyBusy
from autoq.store import Store, StudyRecord
from autoq.store.queue_records import JOB, RUN

if TYPE_CHECKING:
    from autoq.search.executors import Executor
    from autoq.search.holding import Hold
    from autoq.search.observer import Observer
    from autoq.spec import StudySpec

BUSY = 75  # EX_TEMPFAIL
LOG_BYTES = 1 << 20

Make = Callable[["StudySpec"], "Executor"]


def run(store: Store, study_id: int, make: Make | None = None) -> int:
    """Do the job of a study that waits in the queue, or that a former runner left; the exit code.

    `make` makes the executor of a spec (default: what the spec names).
    """
    from autoq.search.holding import holding

    try:
        with holding(store, study_id, queued=True) as hold:
            study = hold.store.study(study_id)
            if study.state not in ("queued", "running"):
                return 0  # it was cancelled since
            return _do(hold, study, make)
    except (StudyBusy, LeaseLost) as problem:
        _say(str(problem))
        return BUSY


def _do(hold: Hold, study: StudyRecord, make: Make | None) -> int:
    job = hold.store.table(study.id, JOB) or RUN
    _say(f"{job['kind']} study {study.name}")
    try:
        _JOBS[job["kind"]](hold, study, job, make)
    except (LeaseLost, KeyboardInterrupt):
        raise
    except Stopped as problem:
        _say(str(problem))
    except AutoQError as problem:
        if job["kind"] != "run":
            # A study that is added to stays finished; why nothing was added is said all the same.
            hold.store.queue.settle(study.id, "finished", f"{job['kind']}: {problem}")
        _say(f"failed: {problem}")
        return 1
    _say(f"study {study.name} is {hold.store.study(study.id).state}")
    return 0


def _run(hold: Hold, study: StudyRecord, job: Mapping[str, Any], make: Make | None) -> None:
    from autoq.search.controller import run_study
    from autoq.search.executors import make_executor

    run_study(hold.store, study.id, _log(), make or make_executor, hold)


def _refine(hold: Hold, study: StudyRecord, job: Mapping[str, Any], make: Make | None) -> None:
    from autoq.search.executors import make_executor
    from autoq.search.refining import refine_study
    from autoq.study import bounds

    if (first := job.get("first")) is None:
        # Nobody else adds trials now. What comes from here on is this job's, also if it has to begin again.
        first = 1 + max((trial.number for trial in hold.store.trials(study.id)), default=-1)
        hold.store.put_table(study.id, JOB, {**job, "first": first})
    limits = bounds(study, job["max"], job["min"])
    refine_study(
        hold.store, study.id, limits, job["n"], _log(), make or make_executor, job["best"], hold, first
    )  # fmt: skip


def _sequential(hold: Hold, study: StudyRecord, job: Mapping[str, Any], make: Make | None) -> None:
    from autoq.search.deriving import here
    from autoq.search.sequencing import sequence_trial

    sequence_trial(hold.store, study.id, job["trial"], _log(), make or here, hold)


def _recover(hold: Hold, study: StudyRecord, job: Mapping[str, Any], make: Make | None) -> None:
    from autoq.search.deriving import here
    from autoq.search.recovering import recover_trial
    from autoq.search.training import Training

    recover_trial(hold.store, study.id, job["trial"], Training(**job["training"]), _log(), make or here, hold)


_JOBS: Mapping[str, Callable[[Any, StudyRecord, Mapping[str, Any], Make | None], None]] = {
    "run": _run,
    "refine": _refine,
    "sequential": _sequential,
    "recover": _recover,
}


def _log() -> Observer:
    """Writes stages, notes and failures, one line each."""
    from autoq.search.observer import Observer

    class Log(Observer):
        def stage(self, name: str, total: int | None) -> None:
            _say(f"{name}: {total} steps" if total is not None else name)

        def trial(self, trial: Any, done: int, budget: int) -> None:
            why = f": {trial.error.message}" if trial.error is not None else ""
            _say(f"trial {trial.number} {trial.state}, {done} of {budget}{why}")

        def note(self, text: str) -> None:
            _say(text)

    return Log()


def _say(line: str) -> None:
    """One line of the log, which begins anew where it has grown too long."""
    state = os.fstat(2)
    if stat.S_ISREG(state.st_mode) and state.st_size > LOG_BYTES:
        os.ftruncate(2, 0)
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str], make: Make | None = None) -> int:
    """Run the study of that id in the database of `AUTOQ_DB`; the exit code."""
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _interrupt)
    with Store.open(os.environ["AUTOQ_DB"], create=False) as store:
        try:
            return run(store, int(arguments[0]), make)
        except KeyboardInterrupt:
            with contextlib.suppress(AutoQError):
                _say("told to end")
            return 0
        except AutoQError as problem:
            _say(f"failed: {problem}")
            return 1
        except Exception:
            _say(traceback.format_exc())
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
