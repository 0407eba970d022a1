"""One-dimensional k-means over many rows at once, with or without an importance of each number.

It minimizes Σ a (x - c_q)² over centroids c and codes q of each row by itself, and alternates (Lloyd, "Least
Squares Quantization in PCM", 1957/1982)

    q ← the nearest c: the border between two neighbours is their midpoint
    c_j ← the mean of the numbers with q = j, weighted by a

In one dimension clusters are intervals of the sorted numbers, so a clustering is its borders: `edges`, indices
into the sorted row (k + 1 of them, e_0 = 0 and e_k = n). Prefix sums A of a, S of a x and Q of a x² give each
interval's mean and error from its two ends alone, so an iteration costs k log n per row and not n.

    x  `ordered`    A  `masses`    S  `sums`    Q  `squares`    c  `centroids`    k  `levels`

- Two deterministic starts, the better result of each row wins. One is the levels of rtn, so the outcome is not
  worse than rtn's by squared error. The other puts centroids as densely as the cube root of the numbers'
  density times their importance, which is optimal for many levels (Panter & Dite, 1951): borders at equal shares
  of Σ a^(1/3) gap^(2/3), as the gap between sorted neighbours is inverse to the density.
- An empty cluster splits the interval with the largest error, and when the iterations have come to rest, the
  least useful borders are tried where a split gains most: Lloyd's rest is a local optimum, often far off.
- With an importance the start from rtn's levels is replaced by the clustering without one, and of the two
  results as they ship, in bfloat16, each row takes the better: not worse than without, by its own measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoq.methods._uniform import minmax_grid, stored

ITERATIONS = 100
RELOCATIONS = 32
TRIES = 2


def fit(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The codebook of each row of `values` (rows, n) float32: (rows, 2**bits), ascending, as it ships.

    `importance` (rows, n) float32 is positive; where all of it is equal it changes nothing.
    """
    if importance is None or importance.amin() == importance.amax():
        rows = _Rows.of(values)
        return rows.book(_best(rows, [_by_density(rows, bits), _by_range(rows, bits)]))
    plain, rows = _Rows.both(values, importance)
    edges = _best(plain, [_by_density(plain, bits), _by_range(plain, bits)])
    without, book = plain.book(edges), rows.book(_best(rows, [_by_density(rows, bits), edges]))
    return torch.where(rows.distortion(book) <= rows.distortion(without), book, without)


def borders(book: Tensor) -> Tensor:
    """Where the nearest of ascending centroids (rows, k) changes, (rows, k - 1)."""
    # Halved before adding: the sum of two finite numbers need not be finite.
    return book[:, 1:] / 2 + book[:, :-1] / 2


def _best(rows: _Rows, starts: list[Tensor]) -> Tensor:
    """The borders (rows, k + 1) that are reached from the better of two starts."""
    one, other = (_descend(rows, start) for start in starts)
    return _relocate(rows, torch.where(rows.total(other) < rows.total(one), other, one))


@dataclass(frozen=True)
class _Rows:
    """Sorted rows (rows, n) with prefix sums (rows, n + 1) of their importance, their numbers and squares, float64.

    Without an importance each number has one of 1, and `masses` is None.
    """

    ordered: Tensor
    masses: Tensor | None
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Rows:
        return cls._summed(torch.from_numpy(np.sort(values.numpy(), axis=-1)).double(), None)

    @classmethod
    def both(cls, values: Tensor, importance: Tensor) -> tuple[_Rows, _Rows]:
        """The same rows without and with an importance (rows, n)."""
        order = _order(values)
        ordered = values.gather(-1, order).double()
        return cls._summed(ordered, None), cls._summed(ordered, importance.gather(-1, order).double())

    @classmethod
    def _summed(cls, ordered: Tensor, importance: Tensor | None) -> _Rows:
        numbers = ordered if importance is None else ordered * importance
        masses = None if importance is None else _prefix(importance)
        return cls(ordered, masses, _prefix(numbers), _prefix(numbers * ordered))

    def __len__(self) -> int:
        return len(self.ordered)

    @property
    def count(self) -> int:
        """Numbers per row."""
        return self.ordered.shape[1]

    def take(self, chosen: Tensor) -> _Rows:
        """The rows of these indices."""
        masses = None if self.masses is None else self.masses[chosen]
        return _Rows(self.ordered[chosen], masses, self.sums[chosen], self.squares[chosen])

    def mass(self, start: Tensor, end: Tensor) -> Tensor:
        """The importance of the numbers from index `start` to before `end`; 1 for none, to divide by."""
        if self.masses is None:
            return (end - start).clamp_min(1)
        return torch.where(end > start, self.masses.gather(-1, end) - self.masses.gather(-1, start), 1.0)

    def find(self, numbers: Tensor) -> Tensor:
        """How many of its row's numbers lie below each of `numbers` (rows, m)."""
        return torch.searchsorted(self.ordered, numbers.contiguous())

    def centroids(self, edges: Tensor) -> Tensor:
        """Each interval's mean, (rows, k); that of an empty one is the number at its border."""
        counts = edges.diff(dim=-1)
        means = self.sums.gather(-1, edges).diff(dim=-1) / self.mass(edges[:, :-1], edges[:, 1:])
        at_border = self.ordered.gather(-1, edges[:, :-1].clamp_max(self.count - 1))
        return torch.where(counts > 0, means, at_border)

    def spread(self, start: Tensor, end: Tensor) -> Tensor:
        """The error around their mean of the numbers from index `start` to before `end`."""
        total = self.sums.gather(-1, end) - self.sums.gather(-1, start)
        square = self.squares.gather(-1, end) - self.squares.gather(-1, start)
        return square - total.square() / self.mass(start, end)

    def errors(self, edges: Tensor) -> Tensor:
        """Each interval's error around its mean, (rows, k)."""
        return self.spread(edges[:, :-1], edges[:, 1:])

    def total(self, edges: Tensor) -> Tensor:
        """The error of all intervals, (rows, 1)."""
        return self.errors(edges).sum(-1, keepdim=True)

    def book(self, edges: Tensor) -> Tensor:
        """The centroids as they ship, (rows, k) float32, ascending."""
        return stored(self.centroids(edges).float()).sort(-1).values

    def distortion(self, book: Tensor) -> Tensor:
        """The error under the centroids of a book (rows, k), each number taking the nearest; (rows, 1)."""
        edges = _between(self.find(borders(book).double()), self.count)
        start, end = edges[:, :-1], edges[:, 1:]
        mass = torch.where(end > start, self.mass(start, end), 0.0)
        linear, square = (sums.gather(-1, edges).diff(dim=-1) for sums in (self.sums, self.squares))
        centroid = book.double()
        return (square - centroid * (2 * linear - centroid * mass)).sum(-1, keepdim=True)

    def gaps(self) -> Tensor:
        """Σ a^(1/3) gap^(2/3) up to each gap between neighbours, (rows, n - 1)."""
        shares = self.ordered.diff(dim=-1).pow_(2 / 3)
        if self.masses is not None:
            shares *= (self.masses[:, 2:] - self.masses[:, :-2]).div_(2).pow_(1 / 3)
        return shares.cumsum(-1)


def _prefix(numbers: Tensor) -> Tensor:
    return torch.nn.functional.pad(numbers.cumsum(-1), (1, 0))


def _order(values: Tensor) -> Tensor:
    """The stable order (rows, n) of each row of finite float32: its bits, made to ascend, above each index."""
    bits = values.contiguous().view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ascending << 32) + torch.arange(values.shape[1])
    return torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFFFFFF


def _descend(rows: _Rows, edges: Tensor) -> Tensor:
    """Lloyd's iterations from `edges` (rows, k + 1) until no border moves; finished rows drop out."""
    edges = edges.clone()
    moving = torch.arange(len(rows))
    for _ in range(ITERATIONS):
        now = edges[moving]
        centroids = rows.centroids(now)
        moved = now.clone()
        moved[:, 1:-1] = rows.find((centroids[:, 1:] + centroids[:, :-1]) / 2)
        _use_idle_borders(rows, moved)
        edges[moving] = moved
        changed = (moved != now).any(-1)
        left = int(changed.sum())
        if left == 0:
            break
        # Copying the rows that still move pays only when many have stopped.
        if left < len(moving) / 2:
            rows, moving = rows.take(changed.nonzero().view(-1)), moving[changed]
    return edges


def _use_idle_borders(rows: _Rows, edges: Tensor) -> None:
    """Where intervals are empty, let their borders split the intervals with the largest errors, in place."""
    idle = (edges[:, 1:-1] == edges[:, :-2]) | (edges[:, 1:-1] == rows.count)
    some = idle.any(-1).nonzero().view(-1)
    if not len(some):
        return
    rows, few, idle = rows.take(some), edges[some], idle[some]
    errors, order = rows.errors(few).sort(-1, descending=True)
    rank = (idle.cumsum(-1) - 1).clamp_min_(0)
    # Below rounding error there is nothing to gain, and equal weights cannot be split.
    useful = idle & (errors.gather(-1, rank) > 1e-12 * rows.squares[:, -1:])
    split = rows.find(rows.centroids(few).gather(-1, order.gather(-1, rank)))
    few[:, 1:-1] = torch.where(useful, split, few[:, 1:-1])
    edges[some] = few.sort(-1).values


def _relocate(rows: _Rows, edges: Tensor) -> Tensor:
    """Leave local optima: move a border of little use to where a split gains most, and descend again.

    A row goes on for as long as that lowers its error. If it does not, the next less useless border is
    tried, until `TRIES` in a row failed.
    """
    edges = edges.clone()
    moving = torch.arange(len(rows))
    failures = torch.zeros_like(moving)
    for _ in range(RELOCATIONS):
        now = edges[moving]
        errors = rows.errors(now)
        loss = rows.spread(now[:, :-2], now[:, 2:]) - errors[:, 1:] - errors[:, :-1]
        border = loss.argsort(-1).gather(-1, failures[:, None])
        split = rows.find(rows.centroids(now))
        gain = errors - rows.spread(now[:, :-1], split) - rows.spread(split, now[:, 1:])
        # Border i + 1 lies between intervals i and i + 1, which it leaves to each other.
        target = gain.scatter(-1, torch.cat([border, border + 1], -1), -torch.inf).argmax(-1, keepdim=True)
        trial = now.scatter(-1, border + 1, split.gather(-1, target)).sort(-1).values
        trial = _descend(rows, trial)
        better = rows.errors(trial).sum(-1) < errors.sum(-1) * (1 - 1e-6)
        edges[moving] = torch.where(better[:, None], trial, now)
        failures = torch.where(better, 0, failures + 1)
        hopeful = (failures < min(TRIES, loss.shape[1])).nonzero().view(-1)
        if not len(hopeful):
            break
        rows, moving, failures = rows.take(hopeful), moving[hopeful], failures[hopeful]
    return edges


def _by_density(rows: _Rows, bits: int) -> Tensor:
    """Borders at equal shares of Σ a^(1/3) gap^(2/3), (rows, k + 1)."""
    reached = rows.gaps()
    shares = torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits
    return _between(1 + torch.searchsorted(reached, reached[:, -1:] * shares), rows.count)


def _by_range(rows: _Rows, bits: int) -> Tensor:
    """Borders halfway between the levels of rtn with an integer zero point, (rows, k + 1)."""
    low, high = rows.ordered[:, :1].float(), rows.ordered[:, -1:].float()
    scale, zero = minmax_grid(low, high, bits, "integer")
    return _between(rows.find((torch.arange(2**bits - 1) + 0.5 - zero).double() * scale.double()), rows.count)


def _between(inner: Tensor, count: int) -> Tensor:
    """Borders (rows, k - 1) with the fixed ones, 0 and `count`, around them."""
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=count)
