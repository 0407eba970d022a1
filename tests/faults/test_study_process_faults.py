"""A whole study with its own Ray that ends well, by an interrupt, and by a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow


def gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_crash_leaves_its_last_words_and_nothing_else(tmp_path: Path) -> None:
    """No file, no process, no variable; and no word on stdout, which carries documents."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import ctypes, json, os, signal, sys, tempfile, time
            import psutil
            from autoq.search.executors import Job
            from autoq.spec import StudySpec
            from autoq.workers.executor import RayExecutor

            class Fake:
                def __init__(self, spec): pass
                def fault(self): ctypes.string_at(0)
                def litter(self):
                    with tempfile.NamedTemporaryFile(delete=False) as file:
                        return file.name

            spec = StudySpec.model_validate(
                {"model": {"id": "demo:smollm2"}, "workers": {"executor": "ray", "count": 1, "cpus": 1}})
            environment = dict(os.environ)
            handler = lambda *_: None
            signal.signal(signal.SIGTERM, handler)
            with RayExecutor(spec, Fake) as executor:
                executor.submit(Job("a", "litter"))
                litter = executor.next().value
                assert os.path.exists(litter)
                executor.submit(Job("b", "fault"))
                executor.submit(Job("c", "litter"))
                crash, after = executor.next(), executor.next()
                assert not os.path.exists(litter)
                time.sleep(1.5)  # Ray tells of the crash a little later
                children = psutil.Process().children(recursive=True)
            start = time.monotonic()
            assert dict(os.environ) == environment
            assert signal.getsignal(signal.SIGTERM) is handler
            print(json.dumps({
                "message": crash.failure.message,
                "traceback": crash.failure.traceback,
                "litter": os.path.exists(after.value),
                "alive": [child.pid for child in children if child.is_running()],
                "children": len(psutil.Process().children()),
            }))
            """
        )
    )
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("RAY_AUTH_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["message"].endswith("Fatal Python error: Segmentation fault")
    assert "in fault" in told["traceback"]
    assert (told["litter"], told["alive"], told["children"]) == (False, [], 0)
    assert list(cwd.iterdir()) == []
    assert list(home.iterdir()) == []


def is_agent(pid: int) -> bool:
    """Whether it is one of Ray's agents, also before it has given itself their name."""
    with suppress(psutil.Error):
        command = psutil.Process(pid).cmdline()
        return any(part.endswith(("Agent", "dashboard/agent.py", "runtime_env/agent/main.py")) for part in command)
    return False


DRIVER = """
import sys, time
import psutil
from autoq.search.executors import Job
from autoq.spec import StudySpec
from autoq.workers.executor import RayExecutor

class Fake:
    def __init__(self, spec): pass
    def echo(self, value): return value
    def nap(self): time.sleep(1000)

spec = StudySpec.model_validate(
    {"model": {"id": "demo:smollm2"}, "workers": {"executor": "ray", "count": 2, "cpus": 1}})
with RayExecutor(spec, Fake) as executor:
    executor.submit(Job("a", "echo", {"value": 1}))
    executor.next()
    executor.submit(Job("b", "nap"))
    executor.submit(Job("c", "nap"))
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    print(executor._session.folder, *pids, flush=True)
    executor.next()
"""


def start_driver() -> tuple[subprocess.Popen[str], Path, list[int]]:
    """A study in a process group of its own, waiting for jobs that run."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    folder, *pids = driver.stdout.readline().split()
    time.sleep(0.5)
    return driver, Path(folder), [int(pid) for pid in pids]


def test_an_interrupt_ends_everything_quickly() -> None:
    driver, folder, pids = start_driver()
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=240)  # what it waits for takes 1000
    assert driver.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert out == ""
    assert all(gone(pid, 120) for pid in pids)
    assert not folder.exists()


def test_a_killed_study_takes_its_workers_with_it() -> None:
    driver, folder, pids = start_driver()
    # Ray's two agents need a minute to notice; they hold neither the model nor a CPU.
    agents = {pid for pid in pids if is_agent(pid)}
    driver.kill()
    driver.communicate(timeout=240)
    try:
        assert len(agents) == 2
        assert all(gone(pid, 120) for pid in pids if pid not in agents)
    finally:
        for pid in agents:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert all(gone(pid, 120) for pid in agents)  # they write there
        shutil.rmtree(folder)
