"""Jobs of a study's stages: no study can do without them, so their first failure ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoq import errors
from autoq.errors import AutoQError, BadInput
from autoq.search.executors import Executor, Job, Result, completed


def run_job(executor: Executor, job: Job) -> Result:
    """Run one job of a stage. Raises as `run_jobs` does."""
    (result,) = run_jobs(executor, [job])
    return result


def run_jobs(executor: Executor, jobs: Sequence[Job]) -> Iterator[Result]:
    """Run jobs of a stage; yields their results as they come.

    Raises `AutoQError` with the reason of the first failure, and `BadInput` where it was that.
    """
    for result in completed(executor, jobs):
        if (failure := result.failure) is not None:
            # The failure names its type only, as it may come from another process.
            known = getattr(errors, failure.error, None)
            if isinstance(known, type) and issubclass(known, BadInput):
                raise BadInput(failure.message)
            raise AutoQError(f"{result.job.action}: {failure.message}")
        yield result
