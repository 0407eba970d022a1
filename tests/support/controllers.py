"""Controllers of studies as processes that a test may kill: the real one, with a made-up evaluator.

    python controllers.py

imports what a controller needs, once, and then forks one for each line that it reads: `HOST PAUSE LEASE STUDY URL`.
HOST is the machine that it takes itself to be on (`-`: this one): of another machine's processes nobody knows whether
they live. PAUSE is how long a trial takes, in seconds, and LEASE how long a lease is held without a sign of life (0: as
long as ever). It answers `started PID`, and `ended PID CODE LAST WORDS` when that has ended.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping
from typing import Any

from autoq.errors import AutoQError, LeaseLost, StudyBusy
from autoq.measurement import Measurement
from autoq.scheme import code_bits, parse_scheme
from autoq.search import holding
from autoq.search.controller import run_study
from autoq.search.executors import LocalExecutor
from autoq.search.setup import warm
from autoq.store import Store, holders

KL = "kl_nats_per_token"
DONE, FAILED, BUSY, LOST = 0, 1, 75, 76


def loss(name: str, scheme: Any) -> float:
    """What a layer loses: nothing but its name and its bits decide."""
    return (1 + sum(name.encode()) % 7) * 4.0 ** -code_bits(scheme)


class Evaluator:
    """Answers at once with what depends on the assignment alone, after a pause."""

    pause = 0.0

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def describe(self) -> Mapping[str, Any]:
        return {"device": "made up", "threads": 1}

    def calibrate(self) -> str:
        return "nowhere"

    def sensitivities(self, choices: Mapping[str, list[str]]) -> Mapping[str, Mapping[str, float]]:
        time.sleep(self.pause)
        return {name: {text: loss(name, parse_scheme(text)) for text in texts} for name, texts in choices.items()}

    def measure(self, assignment: Any, part: Any, **_: Any) -> list[Measurement]:
        time.sleep(self.pause)
        value = sum(loss(name, scheme) for name, scheme in assignment.items()) * (1.01 if part == "report" else 1.0)
        return [Measurement(KL, value, "nats/token", "measured", part, stderr=value / 10, n=100)]

    def measure_with_slopes(self, assignment: Any, part: Any, choices: Any, turn: int) -> Any:
        table = {
            name: [2 * loss(name, parse_scheme(text)) * (text == str(assignment[name])) for text in texts]
            for name, texts in choices.items()
        }
        measured = self.measure(assignment, part)
        return measured, {"loss": measured[0].value, "table": table}


def control(database: str, study_id: int) -> tuple[int, str]:
    """Run a study here; an exit code and what there is to say."""
    with Store.open(database, create=False) as store:
        try:
            return DONE, run_study(store, study_id, make=lambda spec: LocalExecutor(spec, Evaluator)).state
        except StudyBusy as problem:
            return BUSY, str(problem)
        except LeaseLost as problem:
            return LOST, str(problem)
        except AutoQError as problem:
            return FAILED, str(problem)


def fork(line: str) -> tuple[int, int]:
    """One controller; its process id, and the end of a pipe that has its last words."""
    host, pause, lease, study_id, database = line.split()
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    if host != "-":
        holders.host = lambda: host  # type: ignore[assignment]
    Evaluator.pause = float(pause)
    if float(lease):
        holding.LEASE_SECONDS, holding.BEAT_SECONDS = float(lease), float(lease) / 4
    code, said = 70, ""
    try:
        code, said = control(database, int(study_id))
    except BaseException as bug:
        said = f"{type(bug).__name__}: {bug}"
    os.write(write, said.encode())
    os._exit(code)


def main() -> None:
    """Answer lines until there are none; what runs then is killed."""
    warm()
    print("ready", flush=True)
    lines = open(0, "rb", buffering=0)  # noqa: SIM115 - select sees no buffer
    running: dict[int, tuple[int, int]] = {}  # by the descriptor that tells of the end
    while True:
        ready, _, _ = select.select([lines, *running], [], [])
        for each in ready:
            if each is not lines:
                pid, read = running.pop(each)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                said = os.read(read, 4096).decode().replace("\n", " ")
                os.close(read)
                os.close(each)
                print("ended", pid, code, said, flush=True)
            elif line := lines.readline().decode():
                pid, read = fork(line)
                running[os.pidfd_open(pid)] = pid, read
                print("started", pid, flush=True)
            else:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                return


if __name__ == "__main__":
    main()
