"""llama.cpp's own block formats, made by ggml's own reference quantizers.

Source: ggml-quants.c of llama.cpp, as the package libgguf builds it. A block of 32 weights (Q4_0, Q8_0,
IQ4_NL, …), or of 256 in sub-blocks (K- and IQ-types), has half-precision scales; codes and scales are
searched together so that the sum of h (w - w')² over the block is small. Without an importance matrix h is
a function of w alone, another one for each type. With one it is

    h_j = E[x_j²] √(c σ² + w_j²)        and for Q6_K h_j = E[x_j²]

    w  weight         w'  what its code stands for        x_j  the layer's j-th input
    σ² mean of w² over the row (blocks of 32) or over the block (of 256)      c  1 or 2, by type

Where we differ: E[x_j²] is never below a millionth of its mean. ggml takes zeros as they are, and the
codes of a block whose inputs were all silent in the calibration text would be anything at all.

Q8_0 and MXFP4 take no importance matrix; none of the types here needs one (those below 3 bits do, and are
left out). For Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 the bytes are also those of the package gguf.
F16 and BF16 round to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from autoq.errors import AutoQError, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Grid, QuantizedWeight, Statistics
from autoq.methods._gguf_weight import FLOATS, GgufWeight, ggml_type
from autoq.methods._inputs import importance
from autoq.methods._ruled import RuledMethod
from autoq.scheme import GGUF_TYPES, Gguf, Scheme

_NO_IMPORTANCE = frozenset({*FLOATS, "q8_0", "mxfp4"})
_LIKE_FLOAT32 = frozenset({"bf16", "mxfp4"})  # exponents of 8 bits; all others end where halves do


class GgufBlocks(RuledMethod):
    """Blocks as llama.cpp stores them."""

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        if layer.kind == "embedding" and isinstance(scheme, Gguf) and scheme.importance:
            return "an embedding has no inputs whose importance could be measured"
        return super().refuses(layer, scheme)

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Gguf):
            return "gguf makes llama.cpp's types only"
        if shape[1] % scheme.block:
            return f"blocks of {scheme.block} do not divide the {shape[1]} inputs of shape {shape}"
        if scheme.importance and scheme.type in _NO_IMPORTANCE:
            return f"{scheme.type} takes no importance matrix"
        return None

    def uses_statistics(self, scheme: Scheme) -> bool:
        return isinstance(scheme, Gguf) and scheme.importance

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Gguf)
        values = weight.float()
        largest = float(values.abs().max())
        if scheme.type not in _LIKE_FLOAT32 and largest > torch.finfo(torch.float16).max:
            raise SchemeRefused(f"{scheme} has scales in half precision, and the weight reaches {largest:.3g}")
        if scheme.type in FLOATS:
            blocks = values.to(FLOATS[scheme.type]).view(torch.uint8)
        else:
            counts = importance(scheme, statistics, weight.shape[1]).numpy() if scheme.importance else None
            blocks = torch.from_numpy(_quantize(values.numpy(), scheme, counts))
        made = GgufWeight(scheme, (weight.shape[0], weight.shape[1]), {"blocks": blocks})
        if not made.dequantize().isfinite().all():
            raise SchemeRefused(f"{scheme} has scales in half precision, which are too small for this weight's range")
        return made

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        """Every type whose nominal width is in `grid.bits` (16 for F16 and BF16), and again with importance."""
        for kind in GGUF_TYPES:
            if Gguf(kind).bits in grid.bits:
                yield Gguf(kind)
                if kind not in _NO_IMPORTANCE:
                    yield Gguf(kind, importance=True)


def _quantize(values: np.ndarray, scheme: Gguf, importance: np.ndarray | None) -> np.ndarray:
    """Blocks (out, bytes per row) uint8 of `values` (out, in) float32 by ggml, on torch's number of threads.

    Rows are independent of each other, and ggml runs without Python's lock.
    """
    try:
        import libgguf
    except ImportError:
        raise AutoQError("GGUF types are made by libgguf: pip install 'autoq[llama-cpp]'") from None

    rows, columns = values.shape
    blocks = np.empty((rows, scheme.nbytes(1, columns, 0)), dtype=np.uint8)
    kind = ggml_type(scheme)

    def part(start: int, end: int) -> None:
        libgguf.quantize_rows_into_raw(kind, values[start:end], blocks[start:end], end - start, columns, importance)

    threads = min(torch.get_num_threads(), rows - 1)
    if threads <= 1:
        part(0, rows)
        return blocks
    # ggml builds a type's tables when it first needs them, which two threads at once do not survive.
    part(0, 1)
    edges = [1 + (rows - 1) * index // threads for index in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, edges[:-1], edges[1:]))
    return blocks
