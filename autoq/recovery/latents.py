"""What is trained of a quantized layer, and its gradients through rounding.

Integer schemes are trained as in Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 5: the forward
pass sees the weight that ships, and the backward pass takes rounding for the identity within the range of the codes.

    u = w/s + z      q = clamp(round(u), 0, Q)      ŵ = (q − z) s      Q = 2^b − 1

    ∂ŵ/∂w = 1 where 0 ≤ round(u) ≤ Q, else 0
    ∂ŵ/∂s = (q − z) − (u − z) inside, q − z outside
    ∂ŵ/∂z = −s outside, 0 inside (as in LSQ+, Bhalgat et al. 2020)

    w  latent weight     s  scale     z  zero point     q  codes     b  bits

Where we differ. w is kept as v = w/s₀ in units of the first scale s₀ and s as the logarithm of s/s₀, so that one
learning rate means the same for all layers, models and widths: so many steps of the grid, such a share of a scale. s
and z are rounded as they ship (bfloat16, or a code) before codes are chosen, and that rounding, too, is passed through.
A latent weight starts at the weight, or at the nearest place that rounds to the code which the method chose and is
inside the range: so training begins at the very layer that was measured, and every weight has a gradient. Adam
divides constant factors out again, so they are left out: LSQ's 1/sqrt(n Q) of the gradients of s, n weights sharing it,
and s₀.

Of a codebook the centroids are trained, each by the sum of the gradients of its weights, and codes stay. They are kept
as their way from the first ones in units of the mean distance between neighbours.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight
from autoq.methods._uniform import MIN_SCALE, stored
from autoq.methods._weights import CodebookWeight, IntegerWeight, row_blocks, to_dtype
from autoq.scheme import Codebook, Integer

BETAS = (0.9, 0.99)
EPSILON = 1e-12  # of gradients that are means over tokens, which are small
_EDGE = 0.499  # how far from the middle of a code's cell a latent weight may start


class Moments:
    """Adam (Kingma and Ba, 2015) for one tensor: its running means of gradients and of their squares, float32."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor, count: int, where: slice = slice(None)) -> Tensor:
        """The normalized direction of update number `count`, from 1, for the rows `where`."""
        mean, square = self.mean[where], self.square[where]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = math.sqrt(1 - BETAS[1] ** count) / (1 - BETAS[0] ** count)
        return mean.div(square.sqrt().add_(EPSILON)).mul_(scale)


class Latent(abc.ABC):
    """A layer in training: (out, in) numbers that become a `QuantizedWeight` of the same scheme.

    `parameters` are trained, by name; their `moments` have the same names. All float32 on the CPU.
    """

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Moments]

    @abc.abstractmethod
    def write(self, weight: Tensor) -> None:
        """Put the values that ship into `weight` (out, in), in its dtype."""

    @abc.abstractmethod
    def learn(self, gradient: Tensor, count: int, rates: Mapping[str, float]) -> None:
        """Take update number `count`, from 1, by ∂loss/∂ŵ (out, in); `rates` per kind of parameter."""

    @abc.abstractmethod
    def quantized(self) -> QuantizedWeight:
        """The layer as it ships."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that training goes on from, by name; to be written to when a checkpoint is read."""
        for name, parameter in self.parameters.items():
            yield name, parameter
            yield f"{name}.mean", self.moments[name].mean
            yield f"{name}.square", self.moments[name].square


def latent(quantized: QuantizedWeight, weight: Tensor) -> Latent:
    """What is to be trained of a layer, from what was measured of it and its unquantized `weight` (out, in)."""
    if isinstance(quantized, IntegerWeight):
        return IntegerLatent(quantized, weight)
    assert isinstance(quantized, CodebookWeight), quantized.scheme
    return CodebookLatent(quantized)


class IntegerLatent(Latent):
    """A layer of uniform levels: latent weights `v`, scales `t` and zero points `z`."""

    def __init__(self, quantized: IntegerWeight, weight: Tensor) -> None:
        scheme = quantized.scheme
        assert isinstance(scheme, Integer)
        self.scheme, self.shape, self.top = scheme, quantized.shape, 2**scheme.bits - 1
        rows, columns = self.shape
        self.first = quantized.tensors["scales"].float()  # s₀ (rows or 1, groups)
        self.groups = self.first.shape[1]
        zeros = quantized.zeros()[: len(self.first)].contiguous().clone()
        v = torch.empty(rows, self.groups, columns // self.groups)
        codes = quantized.codes()
        for block in row_blocks(rows, columns):
            own = self._of(block)
            u = weight[block].cpu().float().view_as(v[block]) / self.first[own, :, None]
            u += zeros[own, :, None]
            q = codes[block].view_as(u).float()
            v[block] = u.clamp_(q - _EDGE, q + _EDGE) - zeros[own, :, None]
        self.v, self.t, self.z = v, torch.zeros_like(self.first), zeros
        self.parameters = {"v": self.v, "t": self.t} | ({} if scheme.zero == "none" else {"z": self.z})
        self.moments = {name: Moments(parameter) for name, parameter in self.parameters.items()}

    def _of(self, block: slice) -> slice:
        """The rows of the scales that belong to some rows of weights."""
        return block if len(self.first) == self.shape[0] else slice(None)

    def scales(self) -> Tensor:
        """s as it ships, float32 (rows or 1, groups)."""
        return stored(self.first * self.t.exp()).clamp_min_(MIN_SCALE)

    def zeros(self) -> Tensor:
        """z as it ships, float32 (rows or 1, groups)."""
        if self.scheme.zero == "real":
            return stored(self.z)
        return self.z.round().clamp_(0, self.top)

    def _position(self, block: slice, scale: Tensor, zero: Tensor) -> Tensor:
        """u (rows, groups, n) of some rows."""
        own = self._of(block)
        return self.v[block].mul((self.first[own] / scale[own])[:, :, None]).add_(zero[own, :, None])

    def write(self, weight: Tensor) -> None:
        scale, zero = self.scales(), self.zeros()
        rows, columns = self.shape
        for block in row_blocks(rows, columns):
            own = self._of(block)
            q = self._position(block, scale, zero).round_().clamp_(0, self.top)
            values = q.sub_(zero[own, :, None]).mul_(scale[own, :, None])
            weight[block] = to_dtype(values.view(-1, columns), weight.dtype).to(weight.device)

    def learn(self, gradient: Tensor, count: int, rates: Mapping[str, float]) -> None:
        scale, zero = self.scales(), self.zeros()
        of_scale, of_zero = torch.zeros_like(scale), torch.zeros_like(scale)
        rows, columns = self.shape
        for block in row_blocks(rows, columns):
            own = self._of(block)
            g = gradient[block].float().cpu().view_as(self.v[block])
            u = self._position(block, scale, zero)
            rounded = u.round()
            q = rounded.clamp(0, self.top)
            inside = rounded.eq_(q)
            lever = (q - zero[own, :, None]).sub_(u.sub_(zero[own, :, None]).mul_(inside))
            self._collect(of_scale, own, g * lever)
            if "z" in self.parameters:
                self._collect(of_zero, own, g * (1 - inside))
            self.v[block] -= self.moments["v"].step(g.mul_(inside), count, block).mul_(rates["weights"])
        grown = scale / self.first.clamp_min(MIN_SCALE)  # s/s₀
        self.t -= self.moments["t"].step(of_scale * grown, count).mul_(rates["scales"])
        if "z" in self.parameters:
            step = self.moments["z"].step(of_zero * -grown, count)
            self.z -= step.mul_(rates["weights"])

    def _collect(self, total: Tensor, own: slice, each: Tensor) -> None:
        """Add what the weights (rows, groups, n) say of their group's parameter."""
        total[own] += each.sum(-1) if len(total) == self.shape[0] else each.sum()

    def quantized(self) -> QuantizedWeight:
        scale, zero = self.scales(), self.zeros()
        codes = torch.empty(self.shape, dtype=torch.uint8)
        rows, columns = self.shape
        for block in row_blocks(rows, columns):
            q = self._position(block, scale, zero).round_().clamp_(0, self.top)
            codes[block] = q.view(-1, columns).to(torch.uint8)
        return IntegerWeight.of(self.scheme, codes, scale, None if self.scheme.zero == "none" else zero)


class CodebookLatent(Latent):
    """A layer of free levels: the way `x` of its centroids from where they began."""

    def __init__(self, quantized: CodebookWeight) -> None:
        assert isinstance(quantized.scheme, Codebook)
        self.scheme, self.shape, self.codes = quantized.scheme, quantized.shape, quantized.codes()
        self.first = quantized.tensors["codebook"].float()  # (rows or 1, groups, levels), ascending
        self.unit = (self.first[..., -1:] - self.first[..., :1]) / (self.first.shape[-1] - 1)
        self.x = torch.zeros_like(self.first)
        self.parameters, self.moments = {"x": self.x}, {"x": Moments(self.x)}

    def books(self) -> Tensor:
        """The centroids as they ship, float32 (rows or 1, groups, levels), in the order of the codes."""
        return stored(self.first + self.x * self.unit)

    def _places(self, block: slice) -> tuple[slice, Tensor]:
        """The books of some rows, and for each weight (rows, in) its place among their flattened centroids."""
        count, groups, levels = self.first.shape
        codes = self.codes[block].long()
        if count == 1:
            return slice(None), codes
        first = torch.arange(0, len(codes) * groups * levels, levels).view(-1, groups, 1)
        return block, (codes.view(len(codes), groups, -1) + first).view_as(codes)

    def write(self, weight: Tensor) -> None:
        books = to_dtype(self.books(), weight.dtype)
        for block in row_blocks(*self.shape):
            own, places = self._places(block)
            weight[block] = books[own].reshape(-1)[places].to(weight.device)

    def learn(self, gradient: Tensor, count: int, rates: Mapping[str, float]) -> None:
        total = torch.zeros_like(self.first)
        for block in row_blocks(*self.shape):
            own, places = self._places(block)
            sums = torch.zeros(total[own].numel())
            sums.index_add_(0, places.view(-1), gradient[block].float().cpu().reshape(-1))
            total[own] += sums.view_as(total[own])
        self.x -= self.moments["x"].step(total, count).mul_(rates["weights"])

    def quantized(self) -> QuantizedWeight:
        books, order = self.books().sort(dim=-1, stable=True)
        rank = order.argsort(-1)
        codes = torch.empty_like(self.codes)
        for block in row_blocks(*self.shape):
            own, places = self._places(block)
            codes[block] = rank[own].reshape(-1)[places].to(torch.uint8)
        return CodebookWeight.of(self.scheme, codes, books)
