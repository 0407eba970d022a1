"""How far proposals run ahead of what is known.

Trial n is asked for when trial n − `window` has been told, and results are told in the order of trial numbers. With a
window of `workers` a worker that is done waits for the slowest trial that is out: of many durations the longest is
far from the mean, and one that hangs until its limit stops all. With a larger one it goes on with a proposal that was
made before. It costs that the sampler has heard less when it proposes. The longest of w exponential durations is
about ln w times the mean, and durations of trials vary less than that; so the window is w + w log₂(w) / 3: one worker
has 1, two have 3, eight 16, a thousand 4,322. It depends on the spec alone, and so does the study.

A trial that hangs until its limit would still stop all. Once it has been out for `LATE_TIMES` what trials take, and for
some seconds, it is passed over: the sampler counts it as running and hears of it when it ends. From then on the
study depends on that moment too. The seconds are there because a machine may stand still for one of them, whatever
trials take; they are `LATE_SECONDS` for few workers, who lose little by waiting, and fewer for more than `FEW` of them,
so that they lose together no more than `FEW` would, but `LEAST_SECONDS` at the least. A thousand workers run for
4.3 times what a trial takes before their window is used up: from half a second on they are never held up.

Asking takes longer than storing a result, so it is done while workers work and no result has come: of what may be
asked for, as many as there are workers wait here, in no database, until one is free. After a break they are asked for
anew, and are the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

LATE_TIMES, LATE_SECONDS, LEAST_SECONDS = 3.0, 10.0, 2.0
FEW = 8  # workers
_LATEST = 64  # trials whose durations tell what trials take
_FEWEST = 8  # before which nothing is late


def window(workers: int) -> int:
    """How many trials may be asked for and not told."""
    return workers + math.ceil(workers * math.log2(workers) / 3)


class Pace:
    """What trials take, and whether one has been out for so long that it is not waited for."""

    def __init__(self, workers: int) -> None:
        self._least = max(min(LATE_SECONDS, LEAST_SECONDS), LATE_SECONDS * min(1.0, FEW / workers))
        self._seconds: deque[float] = deque(maxlen=_LATEST)

    def took(self, seconds: float) -> None:
        """A trial has ended."""
        self._seconds.append(seconds)

    def is_late(self, seconds: float) -> bool:
        """Whether a trial that has been out for so long is passed over."""
        if len(self._seconds) < _FEWEST or seconds < self._least:
            return False
        return seconds > LATE_TIMES * statistics.median(self._seconds)
