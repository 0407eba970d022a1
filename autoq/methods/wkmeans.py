"""Weight clustering that heeds curvature: kmeans with each weight's error weighed by its input's second moment.

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization" (2024), equation 4: they minimize Σ F (w - c_q)² with F
the diagonal of the Fisher matrix, the mean square of each weight's gradient. For y = W x and a gradient g with
respect to y that is E[(g_i x_j)²], and if gradients and inputs are taken as independent

    F_ij = E[g_i²] E[x_j²]        so per channel or group, where i is fixed:    min Σ_j E[x_j²] (w_j - c_q)²

    E[x²]  the layer's `input_mean_square` (in,)    w, c, q  as in kmeans

which is also the mean squared error of the row's output if inputs are uncorrelated. The clustering is
`_clusters`'; by this measure no row is worse than under kmeans, and with inputs of equal size it is kmeans.

Where we differ: they square the gradients themselves, at one pass of the data for every weight, where two
vectors per layer are kept here; and no outliers are set apart. A book for a whole tensor weighs rows alike. It is
a method of its own, not a second behaviour of kmeans: the name of a scheme must say what comes of a weight,
and kmeans needs no calibration text. Inputs that are hardly ever on count as 10^-6 of the mean.
"""

from __future__ import annotations

from torch import Tensor

from autoq.layer import Layer
from autoq.methods import Statistics
from autoq.methods._codebook import CodebookMethod
from autoq.methods._inputs import importance
from autoq.scheme import Scheme


class WeightedKMeans(CodebookMethod):
    """Codebooks of 2^bits centroids, nearer to the weights of large inputs."""

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        if layer.kind == "embedding":
            return "an embedding has no inputs whose importance could be measured"
        return super().refuses(layer, scheme)

    def uses_statistics(self, scheme: Scheme) -> bool:
        return True

    def importance(self, scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor | None:
        found = importance(scheme, statistics, inputs)
        return found / found.max()  # so that equal ones are 1, exactly
