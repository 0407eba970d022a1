"""What single fields of a spec hold: checked numbers, sizes, times, and words of which there are few.

Each is a type for pydantic; a value that does not fit raises `ValueError` with what it must be.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from autoq.errors import BadInput
from autoq.kv_cache import BITS
from autoq.scheme import MAX_BITS, MIN_BITS, Activation
from autoq.sparsity import SPARSITY_CHOICES, parse_pattern
from autoq.spec_units import parse_address, parse_bytes, parse_seconds

_BLOCK = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _group_size(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 65536
    if not whole and value not in ("channel", "tensor"):
        raise ValueError("must be a whole number from 2 to 65536, channel or tensor")
    return value


def _group_size_or_block(value: object) -> object:
    if isinstance(value, str) and (found := _BLOCK.fullmatch(value)):
        if min(int(found[1]), int(found[2])) < 2:
            raise ValueError("must be a block of at least 2x2, such as 64x64")
        return value
    try:
        return _group_size(value)
    except ValueError as problem:
        raise ValueError(str(problem).replace("channel or", "a block such as 64x64, channel or")) from None


def _sparsity(value: object) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    try:
        return str(parse_pattern(str(value) if whole or isinstance(value, str) else ""))
    except BadInput:
        raise ValueError(f"must be a sparsity: {SPARSITY_CHOICES}") from None


def _cache_bits(value: object) -> object:
    if isinstance(value, bool) or value not in BITS:
        raise ValueError(f"must be one of {', '.join(map(str, BITS))}: bits of a code in a KV cache")
    return value


def _address(value: str) -> str:
    if value != "auto":
        parse_address(value)
    return value


# Whole numbers are strict: 4.0, "4" and true are mistakes more often than they are the number meant.
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
# Far more threads than any machine has crash the OpenMP runtime where they start.
Threads = Annotated[int, Field(strict=True, ge=1, le=1024)]
Bits = Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS)]
Number = Annotated[float, BeforeValidator(_no_bool)]
CacheBits = Annotated[int, BeforeValidator(_cache_bits)]
GroupSize = Annotated[int | str, BeforeValidator(_group_size)]
GroupSizeOrBlock = Annotated[int | str, BeforeValidator(_group_size_or_block)]
ActivationChoice = Literal["none", Activation]
LayerKindChoice = Literal["linear", "embedding", "head", "router"]
Sparsity = Annotated[str, BeforeValidator(_sparsity)]
Address = Annotated[str, AfterValidator(_address)]
