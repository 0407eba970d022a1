"""Weight clustering: every weight takes the nearest of 2^b centroids, which are placed by 1-D k-means.

Lloyd, "Least Squares Quantization in PCM" (1957/1982); for network weights Han, Mao & Dally, "Deep
Compression" (2016). It minimizes the squared error Σ (w - c_q)² over centroids c and codes q per channel,
group or tensor. How, `_clusters` says.

Where we differ from Han et al., and why:

- Besides their linear start, the levels of rtn, there is one that follows the weights' density, and Lloyd's local
  optima are left again.
- No fine-tuning: codes are chosen against the centroids rounded to bfloat16, as they ship.
- One book for a whole tensor is fitted to at most 2^22 evenly spaced weights and the two extremes.
"""

from __future__ import annotations

from torch import Tensor

from autoq.methods import Statistics
from autoq.methods._codebook import CodebookMethod
from autoq.scheme import Scheme


class KMeans(CodebookMethod):
    """Codebooks of 2^bits centroids."""

    def importance(self, scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor | None:
        return None
