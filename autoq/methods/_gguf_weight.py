"""Weights in llama.cpp's block formats, exactly as they lie in a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoq.errors import AutoQError
from autoq.methods import QuantizedWeight
from autoq.scheme import Gguf

FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16}


def gguf_tensors(scheme: Gguf, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors that ship for a weight of `shape` (out, in)."""
    return {"blocks": ((shape[0], scheme.nbytes(1, shape[1], 0)), torch.uint8)}


def ggml_type(scheme: Gguf) -> int:
    """The number that ggml and GGUF files know the type by."""
    try:
        from libgguf import GGMLQuantizationType
    except ImportError:
        raise AutoQError("GGUF types are read by libgguf: pip install 'autoq[llama-cpp]'") from None
    return int(GGMLQuantizationType[scheme.type.upper()])


@dataclass(frozen=True)
class GgufWeight(QuantizedWeight):
    """Blocks of a row one after another. `tensors`: `blocks` (out, bytes per row) uint8."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `QuantizedWeight.dequantize`: by ggml's own code, which is what llama.cpp computes with."""
        from autoq.methods._weights import to_dtype

        scheme, blocks = self.scheme, self.tensors["blocks"]
        assert isinstance(scheme, Gguf)
        if scheme.type in FLOATS:
            return to_dtype(blocks.view(FLOATS[scheme.type]).float(), dtype)
        kind = ggml_type(scheme)
        import libgguf

        values = np.empty(self.shape, dtype=np.float32)
        libgguf.dequantize_rows_into_raw(kind, blocks.numpy(), values, *self.shape)
        return to_dtype(torch.from_numpy(values), dtype)
