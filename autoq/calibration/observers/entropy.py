"""The threshold at which quantized inputs lose the least information, as TensorRT's calibrator.

S. Migacz, "8-bit Inference with TensorRT", GTC 2017: of a histogram of magnitudes with 2,048 bins, for each i

    P  the first i bins, the last of them with the count of all bins beyond
    Q  the same bins without those beyond, merged into L levels, each level's sum spread evenly over those of
       its bins that are not empty
    KL(P ‖ Q) of the two, each divided by its sum

and the threshold (i + ½) width for the i with the least. i begins at L; L = 128, bin b going to level ⌊b L / i⌋,
which is what the slides say of multiples of 128. Our bins reach to a power of two and not to the largest input, so
1,025 to 2,048 of them are in use. Where bin i - 1 is empty and bins beyond are not, the divergence is infinite,
as written; MXNet and TVM smooth it with a small number instead. The first bin, which holds the zeros, counts as any
other (pytorch-quantization overwrites it). Equal divergences: the greater threshold. Two levels that the slides do
not speak of: affine ones over inputs of one sign have L = 256, and of fp8 the merged bins are those that are nearest
to the same E4M3 number.

Everything that a candidate's divergence consists of is a difference of cumulative sums at the levels' bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import Codes, Observer

BINS = 2048


class Entropy(Observer):
    """Least divergence."""

    def choose(self, inputs: Histogram, low: float, high: float, levels: Codes) -> tuple[float, float]:
        """See `Observer.choose`."""
        magnitudes = inputs.magnitudes
        merged = len(magnitudes) // BINS
        counts = magnitudes.view(BINS, merged).sum(1).double()
        cuts = levels.cuts(one_sided=low == 0 or high == 0)
        used, least = int(counts.nonzero()[-1]) + 1, len(cuts) - 1
        if used <= least:
            return low, high
        candidates = torch.arange(least, used + 1)
        candidates = candidates[counts[candidates - 1] > 0]  # others are infinite, as above
        divergences = divergence(counts, candidates, cuts)
        # The last of equal ones.
        index = len(candidates) - 1 - int(divergences.flip(0).argmin())
        threshold = (int(candidates[index]) + 0.5) * merged * inputs.width
        return max(low, -threshold), min(high, threshold)


def divergence(counts: Tensor, candidates: Tensor, cuts: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats (C,) of cutting `counts` (B,) float64 off after each of `candidates` (C,) bins."""
    total = counts.sum()
    sums, filled, entropies = (
        torch.cat([torch.zeros(1, dtype=torch.float64), each.cumsum(0)])
        for each in (counts, (counts > 0).double(), torch.special.xlogy(counts, counts))
    )
    last, kept = counts[candidates - 1], sums[candidates]
    beyond = total - kept
    bounds = (cuts * candidates[:, None]).ceil().long()  # (C, L + 1)
    per_level = sums[bounds].diff(dim=1)
    spread = per_level / filled[bounds].diff(dim=1).clamp(min=1) / kept.clamp(min=1)[:, None]  # Q of a filled bin
    share = per_level / total
    share[:, -1] += beyond / total
    heavier = (last + beyond) / total
    own = (entropies[candidates - 1] - sums[candidates - 1] * total.log()) / total  # of all bins but the last
    own += torch.special.xlogy(heavier, heavier)
    crossed = torch.where(share > 0, share * spread.clamp(min=1e-300).log(), 0.0).sum(1)
    return torch.where((last == 0) & (beyond > 0), torch.inf, own - crossed)
