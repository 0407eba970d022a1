"""Memory limits of jobs: what asks for too much is refused it, by name, and nothing else notices."""

from __future__ import annotations

import resource
import sys

import numpy as np
import pytest

from autoq.search.allowance import allowance, is_shortage
from autoq.search.executors import Job, LocalExecutor
from autoq.spec import build_spec

MB = 10**6
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such limit")


class Evaluator:
    """Takes so many bytes, at once or little by little."""

    def __init__(self, spec):
        self.builds = type(self).builds = getattr(type(self), "builds", 0) + 1

    def array(self, megabytes):
        return float(np.zeros(megabytes * MB, np.uint8)[-1])

    def pieces(self, megabytes):
        return len([bytearray(MB) for _ in range(megabytes)])

    def tensor(self, megabytes):
        import torch

        return float(torch.zeros(megabytes * MB, dtype=torch.uint8)[-1])

    def wrong(self):
        raise RuntimeError("the shapes do not fit")


@pytest.fixture
def run():
    """One executor for all jobs of a test."""
    executor = LocalExecutor(build_spec({"model": {"id": "m"}}), Evaluator)

    def one(action, limit=None, **arguments):
        executor.submit(Job("trial-3", action, arguments, limit_bytes=limit))
        return executor.next()

    return one


@linux
@pytest.mark.parametrize("how", ["array", "pieces", "tensor"])
def test_too_much_is_refused_and_the_evaluator_goes_on(run, how):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert run(how, megabytes=1).failure is None
    failure = run(how, 200 * MB, megabytes=600).failure
    assert (failure.error, failure.crashed) == ("MemoryLimit", False)
    assert failure.message == f"{how!r} of 'trial-3' needs more than its limit of 200 MB beside the model"
    assert f"in {how}" in failure.traceback
    assert run(how, 1000 * MB, megabytes=600).failure is None
    assert run(how, megabytes=600).failure is None
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_other_failures_keep_their_names(run):
    failure = run("wrong", 200 * MB).failure
    assert (failure.error, failure.message) == ("RuntimeError", "the shapes do not fit")
    assert not is_shortage(ValueError("not enough memory"))
    assert is_shortage(OSError(12, "Cannot allocate memory"))


@linux
def test_a_stricter_limit_of_the_process_stays():
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (10**13, hard))
        with allowance(10**15):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 10**13
        with allowance(10**9):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 10**12
        assert resource.getrlimit(resource.RLIMIT_DATA) == (10**13, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
