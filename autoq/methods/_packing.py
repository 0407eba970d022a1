"""Codes of 1 to 8 bits as a little-endian bit stream per row, each row padded to a byte.

Code i of a row occupies bits [i*b, (i+1)*b) of the row's stream, least significant bit first, as in
the packed formats of compressed-tensors and GGUF. Eight codes of b bits are b whole bytes, so eight
codes are handled as one 64-bit word: three rounds of "move the upper half of each lane down onto the
lower half" turn eight lanes of 8 bits into one lane of 8*b bits, and the same rounds backwards undo
it. That is the same dozen word operations for every width, without a branch per code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

assert sys.byteorder == "little", "codes are packed through the bytes of 64-bit words"

# Words per round of operations: small enough that all rounds of a block stay in a core's cache.
_BLOCK_WORDS = 1 << 16


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (rows, count) uint8, each below 2**bits, to (rows, ceil(count*bits/8)) uint8."""
    assert codes.dtype == torch.uint8 and codes.ndim == 2, (codes.dtype, codes.shape)
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    padded = _padded(codes, (count + 7) // 8 * 8)
    packed = torch.empty(rows, padded.shape[1] // 8 * bits, dtype=torch.uint8)
    for block in _row_blocks(rows, padded.shape[1] // 8):
        words = padded[block].view(torch.int64)
        for low, high, shift in _rounds(bits):
            words = (words & low) | ((words & high) >> shift)
        packed[block].view(len(words), -1, bits).copy_(words.view(torch.uint8).view(len(words), -1, 8)[..., :bits])
    return packed[:, : (count * bits + 7) // 8].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_rows`: (rows, count) uint8 from (rows, ceil(count*bits/8)) uint8."""
    assert packed.dtype == torch.uint8 and packed.ndim == 2, (packed.dtype, packed.shape)
    assert packed.shape[1] == (count * bits + 7) // 8, (packed.shape, bits, count)
    if bits == 8:
        return packed
    rows, words_per_row = packed.shape[0], (count + 7) // 8
    padded = _padded(packed, words_per_row * bits)
    codes = torch.empty(rows, words_per_row * 8, dtype=torch.uint8)
    for block in _row_blocks(rows, words_per_row):
        words = _widened(padded[block].view(-1, words_per_row, bits))
        for low, high, shift in reversed(_rounds(bits)):
            words = (words & low) | ((words << shift) & high)
        codes[block].view(torch.int64).copy_(words)
    return codes if codes.shape[1] == count else codes[:, :count].contiguous()


def _widened(groups: Tensor) -> Tensor:
    """(rows, words, bits) bytes as (rows, words) int64, the missing upper bytes zero."""
    rows, words, bits = groups.shape
    if bits in (2, 4):
        return groups.view({2: torch.int16, 4: torch.int32}[bits]).view(rows, words).to(torch.int64)
    wide = torch.zeros(rows, words, 8, dtype=torch.uint8)
    wide[..., :bits] = groups
    return wide.view(torch.int64).view(rows, words)


def _rounds(bits: int) -> list[tuple[int, int, int]]:
    """Per round (kept mask, moved mask before the move, shift): lanes of 8, 16, then 32 bits are joined."""
    rounds = []
    for lane in (8, 16, 32):
        width = lane // 8 * bits
        low = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * lane))
        rounds.append((low, low << lane, lane - width))
    return rounds


def _padded(matrix: Tensor, width: int) -> Tensor:
    """`matrix` contiguous and at least `width` wide, filled up with zeros."""
    if matrix.shape[1] == width:
        return matrix.contiguous()
    return torch.nn.functional.pad(matrix, (0, width - matrix.shape[1]))


def _row_blocks(rows: int, words_per_row: int) -> Iterator[slice]:
    step = max(1, _BLOCK_WORDS // max(1, words_per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
