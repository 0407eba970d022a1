"""Hypervolume: how much of the space of objectives a frontier dominates, as trials come.

The volume between a set of points and a reference point r (Zitzler & Thiele 1998, "Multiobjective optimization using
evolutionary algorithms"); less is better in every coordinate here. One more point p that nobody dominates adds what
it alone dominates, so the volume is kept up, never computed anew:

    1, 2 objectives   the step that p takes, or cuts out of the staircase: exact
    3 objectives      exact. Clipped to p, every other point q exceeds p in one coordinate, where only the nearest
                      counts and shrinks the box, or in two, where it covers a rectangle through the whole box. What
                      stays free is y < f(x), z < g(x), z < h(y) with three falling steps: an integral over x
    4 and more        an estimate by 2^14 points drawn uniformly from the box with a fixed seed

The reference is fixed by the study's baselines: per objective the worst of them, and a tenth of their range beyond, so
that they count too; of a study with fewer than two, its first ten complete feasible trials stand for them. Volumes are
shares of the box from there to the best value of each objective. They are of search values, which steered the search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import drawing

if TYPE_CHECKING:
    from autoq.store import StudyObjective

    from .columns import Trials

Floats = NDArray[np.float64]

SAMPLES = 1 << 14
FIRST = 10  # complete trials that give the reference where there are fewer than two baselines
BEYOND = 0.1
_ROOM = 256


class Volume:
    """The volume that points dominate up to a reference (d,). Points are added one by one; less is better.

    `ideal` (d,) is where the box ends that samples are drawn from; needed for four objectives and more, where no point
    may lie beyond it.
    """

    def __init__(self, reference: Sequence[float], ideal: Sequence[float] | None = None) -> None:
        self.reference = np.asarray(reference, dtype=np.float64)
        self.total = 0.0
        self._dimensions = len(self.reference)
        self._points = np.empty((self._dimensions, _ROOM))  # by coordinate: what is compared lies side by side
        self._count = 0
        self._stairs: tuple[list[float], list[float]] = ([], [])  # of two objectives: x rising, y falling
        self.estimated = self._dimensions > 3
        if self.estimated:
            assert ideal is not None
            low = np.asarray(ideal, dtype=np.float64)
            drawn = np.random.default_rng(0).random((SAMPLES, self._dimensions))
            self._samples = np.ascontiguousarray((low + drawn * (self.reference - low)).T)  # those not yet dominated
            self._box = float(np.prod(self.reference - low))

    @property
    def stderr(self) -> float | None:
        """Standard error of an estimate, None of what is exact."""
        if not self.estimated:
            return None
        share = self.total / self._box if self._box else 0.0
        return self._box * math.sqrt(max(share * (1 - share), 0.0) / SAMPLES)

    def add(self, point: Sequence[float]) -> float:
        """Add a point (d,); the total afterwards."""
        if self._dimensions == 2:
            self.total += self._step(float(point[0]), float(point[1]))
            return self.total
        p = np.asarray(point, dtype=np.float64)
        if (p >= self.reference).any():
            return self.total
        if self.estimated:
            dominated = _all_from(self._samples, p)
            if dominated.any():
                self.total += float(dominated.sum()) / SAMPLES * self._box
                self._samples = self._samples[:, ~dominated]
        elif self._dimensions == 1:
            self.total = max(self.total, float(self.reference[0] - p[0]))
        else:
            self._box_of(p)
        return self.total

    def _box_of(self, p: Floats) -> None:
        """Add a point of three objectives."""
        front = self._points[:, : self._count]
        if _all_from(-front, -p).any():
            return
        beaten = _all_from(front, p)
        kept = front
        if beaten.any():
            # What it beats leaves first, each with what it alone dominates: between the others nobody is beaten.
            kept, leaving = front[:, ~beaten], front[:, beaten]
            for index in range(leaving.shape[1]):
                rest = np.concatenate([kept, leaving[:, index + 1 :]], 1)
                self.total -= exclusive(leaving[:, index], rest, self.reference)
        self.total += exclusive(p, kept, self.reference)
        count = kept.shape[1]
        if count + 1 > self._points.shape[1]:
            self._points = np.concatenate([kept, np.empty_like(kept)], 1)
        elif beaten.any():
            self._points[:, :count] = kept
        self._points[:, count] = p
        self._count = count + 1

    def _step(self, x: float, y: float) -> float:
        """What a point of two objectives adds."""
        right, top = float(self.reference[0]), float(self.reference[1])
        if x >= right or y >= top:
            return 0.0
        xs, ys = self._stairs
        first = bisect_left(xs, x)
        above = ys[first - 1] if first else top
        if above <= y or (first < len(xs) and xs[first] == x and ys[first] <= y):
            return 0.0
        last, gain, left = first, 0.0, x
        while last < len(xs) and ys[last] >= y:
            gain += (xs[last] - left) * (above - y)
            left, above = xs[last], ys[last]
            last += 1
        end = xs[last] if last < len(xs) else right
        gain += (end - left) * (above - y)
        xs[first:last], ys[first:last] = [x], [y]
        return gain


def _all_from(columns: Floats, p: Floats) -> NDArray[np.bool_]:
    """Which of some points, `columns` (d, n), are at least p (d,) in every coordinate."""
    found: NDArray[np.bool_] = columns[0] >= p[0]
    for column, least in zip(columns[1:], p[1:], strict=True):
        found &= column >= least
    return found


def exclusive(p: Floats, front: Floats, reference: Floats) -> float:
    """The volume that p (3,) dominates and no point of `front` (3, n) does; neither of them dominates the other."""
    above = [column > least for column, least in zip(front, p, strict=True)]
    corner = reference.copy()
    for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        nearest = front[i][above[i] & ~above[j] & ~above[k]]
        corner[i] = min(corner[i], nearest.min(initial=np.inf))
    inside = [column < most for column, most in zip(front, corner, strict=True)]
    sides = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = above[i] & above[j] & inside[i] & inside[j]
        sides.append(_Steps.of(p, front[i][pair], front[j][pair], i, j, corner))
    f, g, h = sides  # y < f(x), z < g(x), z < h(y)
    edges = np.unique(np.concatenate([f.starts, g.starts, [corner[0]]]))
    heights = h.below(f.at(edges[:-1]), g.at(edges[:-1]))
    return float((np.diff(edges) * heights).sum())


class _Steps:
    """A falling step function on coordinate i: how far coordinate j is free. From `starts` on it is `levels`."""

    def __init__(self, starts: Floats, levels: Floats, origin: float) -> None:
        self.starts, self.levels, self.origin = starts, levels, origin

    @classmethod
    def of(cls, p: Floats, across: Floats, up: Floats, i: int, j: int, corner: Floats) -> _Steps:
        """From points (n,) of coordinates i and j, each of which covers all beyond it."""
        order = np.argsort(across, kind="stable")
        starts = np.concatenate([[p[i]], across[order]])
        levels = np.minimum.accumulate(np.concatenate([[corner[j]], up[order]]))
        return cls(starts, levels, float(p[j]))

    def at(self, places: Floats) -> Floats:
        """The function (n,) at some places."""
        found: Floats = self.levels[np.searchsorted(self.starts, places, side="right") - 1]
        return found

    def below(self, ends: Floats, heights: Floats) -> Floats:
        """Areas under the function, from its first start to each of `ends` (n,) and no higher than `heights` (n,).

        The function falls: it is cut down to the height until it falls below it, and is itself from there.
        """
        widths = np.diff(self.starts)
        sums = np.concatenate([[0.0], np.cumsum(widths * (self.levels[:-1] - self.origin))])

        def integral(at: Floats) -> Floats:
            place = np.searchsorted(self.starts, at, side="right") - 1
            whole: Floats = sums[place] + (at - self.starts[place]) * (self.levels[place] - self.origin)
            return whole

        # The first step that lies below the height; where none does, the end.
        first = np.searchsorted(-self.levels, -heights, side="right")
        fall = np.where(first < len(self.starts), self.starts[np.minimum(first, len(self.starts) - 1)], np.inf)
        turn = np.minimum(fall, ends)
        start = self.starts[0]
        found: Floats = (turn - start) * (heights - self.origin) + integral(ends) - integral(turn)
        return found


class Curve:
    """The hypervolume after each complete trial of a study, in the order in which they finished.

    `numbers`, `times` (seconds since 1970) and `totals` (n,); `share` scales them to the box. None of them counts
    infeasible trials' points, all of them stand in the order. Empty where no reference is known.
    """

    def __init__(self, reference: Floats, ideal: Floats) -> None:
        self.reference, self.ideal = reference, ideal
        self.numbers: list[int] = []
        self.times: list[float] = []
        self.totals: list[float] = []
        self._volume = Volume(reference.tolist(), ideal.tolist())

    @classmethod
    def of(cls, objectives: Sequence[StudyObjective], trials: Trials, former: Curve | None = None) -> Curve:
        """The curve of all complete trials; goes on from `former` where that is a beginning of it."""
        names = [o.name for o in objectives]
        done = np.flatnonzero(trials.complete(names))
        order = done[np.lexsort((trials.number[done], trials.finished[done]))]
        stacked = np.stack([trials.measured(name, "search").value[order] for name in names], 1)
        points = drawing.costs(stacked, [o.direction for o in objectives])
        feasible = trials.feasible[order] == 1
        reference, ideal = _ends(points, feasible, np.isin(trials.number[order], list(trials.baselines)))
        known = 0
        curve = former
        if curve is None or not curve.begins(trials.number[order], reference, ideal):
            curve = cls(reference, ideal)
        else:
            known = len(curve.numbers)
            curve.ideal = ideal
        for index in range(known, len(order)):
            if feasible[index]:
                curve._volume.add(points[index])
            curve.numbers.append(int(trials.number[order[index]]))
            curve.times.append(float(trials.finished[order[index]]))
            curve.totals.append(curve._volume.total)
        return curve

    def begins(self, numbers: NDArray[np.int64], reference: Floats, ideal: Floats) -> bool:
        """Whether this curve is a beginning of the one of these trials, towards the same reference."""
        if len(self.numbers) > len(numbers) or not np.array_equal(self.reference, reference, equal_nan=True):
            return False
        if self._volume.estimated and not np.array_equal(self.ideal, ideal):
            return False  # samples were drawn from another box
        return bool(self.numbers == numbers[: len(self.numbers)].tolist())

    @property
    def estimated(self) -> bool:
        """Whether volumes are estimates."""
        return self._volume.estimated

    @property
    def box(self) -> float:
        """The volume from the reference to the best value of each objective."""
        return float(np.prod(self.reference - self.ideal)) if len(self.totals) else 0.0

    @property
    def share(self) -> Floats:
        """Volumes (n,) as shares of the box."""
        totals = np.array(self.totals, dtype=np.float64)
        return totals / self.box if self.box > 0 else np.zeros(len(totals))

    @property
    def stderr(self) -> float | None:
        """Standard error of the last share, None where it is exact."""
        error = self._volume.stderr
        return None if error is None or not self.box else error / self.box


def _ends(points: Floats, feasible: NDArray[np.bool_], baseline: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Reference and ideal (d,) of costs (n, d) in the order of finishing."""
    if not feasible.any():
        return np.zeros(points.shape[1]), np.zeros(points.shape[1])
    yardsticks = points[baseline] if baseline.sum() > 1 else points[feasible][:FIRST]
    worst, best = yardsticks.max(0), yardsticks.min(0)
    margin = BEYOND * np.where(worst > best, worst - best, np.where(worst != 0, np.abs(worst), 1.0))
    return worst + margin, points[feasible].min(0)


def sparkline(values: Sequence[float], points: int = 60, width: int = 120, height: int = 24) -> dict[str, object]:
    """At most `points` of the values, evenly, the last one among them, and an SVG path through them.

    `{"values", "path"}`; the path fills a box of `width` by `height`, one unit left free all around.
    """
    whole = [value for value in values if math.isfinite(value)]
    count = min(points, len(whole))
    kept = [float(f"{whole[round(i * (len(whole) - 1) / max(count - 1, 1))]:.6g}") for i in range(count)]
    if count == 1 and whole:
        kept = [float(f"{whole[-1]:.6g}")]
    if not kept:
        return {"values": [], "path": ""}
    low, span = min(kept), (max(kept) - min(kept)) or 1.0
    across = [1 + (width - 2) * i / max(len(kept) - 1, 1) for i in range(len(kept))]
    up = [height - 1 - (height - 2) * (value - low) / span for value in kept]
    steps = [f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True)]
    return {"values": kept, "path": "M" + "L".join(steps) if len(steps) > 1 else f"M{steps[0]}h{width - 2}"}
