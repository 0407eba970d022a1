"""The stored form of what is large: assignments, and values per token.

Values are kept to twelve significant bits, the range of float32 and NaN untouched: a value is off by at most 2⁻¹² of
itself (a half-precision float: 2⁻¹¹), zeros, halves and counts below 4,097 by nothing. What is made of them are
comparisons of trials in pairs, whose errors come from a few thousand tokens and are a thousand times as large; the
mean itself and its error are stored as they were measured. Of the 20 bits that are left, the sign and the seven upper
bits of the exponent say almost nothing: values of one measurement are of similar size. So each goes to a plane of its
own,

    sign and exponent / 2 | rest of the exponent, 7 bits of the mantissa | 4 more bits, two values to a byte

and zlib gets the first by itself, which it packs to a third, and the other two, which it can only keep: 14.5 bits a
value for losses of 2,048 tokens, where zlib alone takes 29.5 for all 32. What was not evaluated is NaN and takes no
room.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from autoq.assignment import Assignment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NAN, _LARGEST = 0x7FC00000, 0x7F7FF000  # as bits; the largest finite value of so many


def pack(assignment: Assignment) -> bytes:
    """The stored form: zlib of the canonical JSON. 210 layers are 10 KB of JSON and about 1 KB of this."""
    return zlib.compress(assignment.json.encode(), level=9)


def unpack(body: bytes) -> Assignment:
    """The inverse of `pack`."""
    return Assignment.from_json(zlib.decompress(body).decode())


def pack_values(values: NDArray[np.float32]) -> dict[str, Any]:
    """The stored form of values (windows, tokens)."""
    import numpy as np

    windows, tokens = values.shape
    bits = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view("<u4")
    size = bits & 0x7FFFFFFF
    # To the nearest, of two the even one.
    rounded = size + 0x7FF + ((size >> 12) & 1) & 0xFFFFF000
    rounded = np.where(size < 0x7F800000, np.minimum(rounded, _LARGEST), size)
    rounded = np.where(size > 0x7F800000, _NAN, rounded | (bits & 0x80000000)).astype("<u4")
    rest = (rounded >> 12 & 0xF).astype(np.uint8)
    rest = np.append(rest, np.zeros(len(rest) % 2, np.uint8))
    packer = zlib.compressobj(strategy=zlib.Z_RLE)  # but for runs of NaN no bytes repeat others
    body = packer.compress((rounded >> 24).astype(np.uint8).tobytes())
    body += packer.flush(zlib.Z_FULL_FLUSH)  # what follows has other frequencies
    body += packer.compress((rounded >> 16).astype(np.uint8).tobytes() + (rest[::2] << 4 | rest[1::2]).tobytes())
    return {"windows": windows, "tokens": tokens, "body": body + packer.flush()}


def unpack_values(windows: int, tokens: int, body: bytes) -> NDArray[np.float32]:
    """The inverse of `pack_values`: values (windows, tokens). Raises `ValueError` for a body of another length."""
    import numpy as np

    count = windows * tokens
    planes = np.frombuffer(zlib.decompress(body), np.uint8)
    if len(planes) != 2 * count + (count + 1) // 2:
        raise ValueError(f"{len(planes)} bytes are not {windows} × {tokens} values")
    first, second, rest = np.split(planes.astype("<u4"), [count, 2 * count])
    last = np.stack([rest >> 4, rest & 0xF], axis=1).reshape(-1)[:count]
    return (first << 24 | second << 16 | last << 12).view("<f4").reshape(windows, tokens).astype(np.float32)
