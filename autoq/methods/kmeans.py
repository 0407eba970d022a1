"""Weight clustering: every weight takes the nearest of 2^b centroids, which are placed by 1-D k-means.

Lloyd, "Least Squares Quantization in PCM" (1957/1982); for network weights Han, Mao & Dally, "Deep
Compression" (2016). It minimizes the squared error Σ (w - c_q)² over centroids c and codes q per channel,
group or tensor, and alternates

    q ← the nearest c: the border between two neighbours is their midpoint
    c_j ← the mean of the weights with q = j

In one dimension clusters are intervals of the sorted weights, so a clustering is its borders: `edges`, indices
into the sorted row (k + 1 of them, e_0 = 0 and e_k = n). Prefix sums S of x and Q of x² give each interval's
mean and squared error from its two ends alone, so an iteration costs k log n per row and not n.

    x  `ordered`    S  `sums`    Q  `squares`    c  `centroids`    k  `levels`

Where we differ from Han et al., and why:

- Two deterministic starts, the better result of each row wins. One is their linear start, the levels of rtn,
  so the outcome is not worse than rtn's by squared error. The other puts centroids as densely as the cube root
  of the weights' density, which is optimal for many levels (Panter & Dite, 1951): borders at equal shares of
  Σ gap^(2/3), as the gap between sorted neighbours is inverse to the density.
- An empty cluster splits the interval with the largest squared error, and when the iterations have come to rest,
  the least useful borders are tried where a split gains most: Lloyd's rest is a local optimum, often far off.
- No fine-tuning: codes are chosen against the centroids rounded to bfloat16, as they ship.
- One book for a whole tensor is fitted to at most 2^22 evenly spaced weights and the two extremes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoq.methods import Grid, QuantizedWeight, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.methods._uniform import minmax_grid, stored
from autoq.methods._weights import CodebookWeight, grid_shape, row_blocks
from autoq.scheme import Codebook, PerTensor, Scheme

ITERATIONS = 100
RELOCATIONS = 32
TRIES = 2
SAMPLE = 1 << 22


class KMeans(RuledMethod):
    """Codebooks of 2^bits centroids."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Codebook):
            return "kmeans makes codebooks only"
        rows, groups = grid_shape(scheme.granularity, shape)
        shared = shape[0] * shape[1] // (rows * groups)
        if shared < 2**scheme.bits:
            return f"{2**scheme.bits} centroids for {shared} weights of shape {shape} are more than there are weights"
        return None

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        for bits in grid.bits:
            for granularity in grid.granularities:
                yield Codebook(name, bits, granularity)

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Codebook)
        rows, columns = weight.shape
        book_rows, groups = grid_shape(scheme.granularity, (rows, columns))
        levels = 2**scheme.bits
        books = torch.empty(book_rows, groups, levels)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        if isinstance(scheme.granularity, PerTensor):
            books[0] = _fit(_sample(weight), scheme.bits)
        for block in row_blocks(rows, columns):
            values = weight[block].float()
            if isinstance(scheme.granularity, PerTensor):
                book, values = books[0], values.reshape(1, -1)
            else:
                values = values.reshape(-1, columns // groups)
                book = _fit(values, scheme.bits)
                books[block] = book.view(-1, groups, levels)
            # Halved before adding: the sum of two finite numbers need not be finite.
            borders = book[:, 1:] / 2 + book[:, :-1] / 2
            codes[block] = torch.searchsorted(borders, values, out_int32=True).view(-1, columns).to(torch.uint8)
        return CodebookWeight.of(scheme, codes, books)


def _sample(weight: Tensor) -> Tensor:
    """At most `SAMPLE` evenly spaced weights and the two extremes, (1, n) float32."""
    flat = weight.reshape(-1)
    stride = -(-len(flat) // SAMPLE)
    chosen = flat if stride == 1 else torch.cat([flat[::stride], torch.stack(torch.aminmax(flat))])
    return chosen.float().view(1, -1)


def _fit(values: Tensor, bits: int) -> Tensor:
    """The codebook of each row of `values` (rows, n) float32: (rows, 2**bits), ascending, as it ships."""
    rows = _Rows.of(values)
    starts = [_descend(rows, start) for start in (_by_density(rows, bits), _by_range(rows, bits))]
    errors = [rows.errors(edges).sum(-1, keepdim=True) for edges in starts]
    edges = _relocate(rows, torch.where(errors[1] < errors[0], starts[1], starts[0]))
    return stored(rows.centroids(edges).float()).sort(-1).values


@dataclass(frozen=True)
class _Rows:
    """Sorted rows (rows, n) with the prefix sums of their numbers and squares (rows, n + 1), float64."""

    ordered: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Rows:
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=-1)).double()
        pad = torch.nn.functional.pad
        return cls(ordered, pad(ordered.cumsum(-1), (1, 0)), pad(ordered.square().cumsum(-1), (1, 0)))

    def __len__(self) -> int:
        return len(self.ordered)

    @property
    def count(self) -> int:
        """Numbers per row."""
        return self.ordered.shape[1]

    def take(self, chosen: Tensor) -> _Rows:
        """The rows of these indices."""
        return _Rows(self.ordered[chosen], self.sums[chosen], self.squares[chosen])

    def find(self, numbers: Tensor) -> Tensor:
        """How many of its row's numbers lie below each of `numbers` (rows, m)."""
        return torch.searchsorted(self.ordered, numbers.contiguous())

    def centroids(self, edges: Tensor) -> Tensor:
        """Each interval's mean, (rows, k); that of an empty one is the number at its border."""
        counts = edges.diff(dim=-1)
        means = self.sums.gather(-1, edges).diff(dim=-1) / counts.clamp_min(1)
        at_border = self.ordered.gather(-1, edges[:, :-1].clamp_max(self.count - 1))
        return torch.where(counts > 0, means, at_border)

    def spread(self, start: Tensor, end: Tensor) -> Tensor:
        """The squared error around their mean of the numbers from index `start` to before `end`."""
        total = self.sums.gather(-1, end) - self.sums.gather(-1, start)
        square = self.squares.gather(-1, end) - self.squares.gather(-1, start)
        return square - total.square() / (end - start).clamp_min(1)

    def errors(self, edges: Tensor) -> Tensor:
        """Each interval's squared error around its mean, (rows, k)."""
        return self.spread(edges[:, :-1], edges[:, 1:])


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
    """Borders at equal shares of Σ gap^(2/3), (rows, k + 1)."""
    reached = rows.ordered.diff(dim=-1).pow_(2 / 3).cumsum(-1)
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
