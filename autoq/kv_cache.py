"""KV caches: what is known of one without weights, and how it may be kept. No torch.

A decoder keeps the keys and values of all earlier tokens, per attention block. They are no weights and ship nowhere,
but with long prompts and many sequences they fill the memory. Text forms: `keep` (in the model's dtype), `kv8`, `kv4`
and `kv2`, as in Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024):

    x' = q s + z        q  code of b bits     s  scale     z  zero: where the range begins

    keys     per channel: s and z for 32 consecutive tokens of one channel, as outliers stay in their channels
    values   per token: s and z for the numbers of one head

Scales and zeros are bfloat16. Keys of tokens that are not yet 32 stay in the model's dtype. Where we differ: KIVI keeps
the newest tokens of values, too, and of both more than a group's; its values have a scale for 32 channels, not for
a head's (64 to 128 as a rule).

Keys are quantized as they are stored, after their rotation (RoPE): as KIVI, llama.cpp, vLLM and transformers have them.
KVQuant (Hooper et al. 2024) quantizes them before, which loses less and takes a kernel that rotates all that it reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoq.errors import BadInput
from autoq.scheme import PARAMETER_BITS, Keep, Scheme, parse_scheme

GROUP = 32  # tokens of a channel of keys that share a scale
BITS = (8, 4, 2)  # widths that a cache is kept in, so that codes fill bytes
VERSION = 1  # of what quantized caches hold and are predicted to lose; raise it when either changes

_TEXT = re.compile(r"kv(\d{1,2})", re.ASCII)
_GRID_BYTES = 2 * PARAMETER_BITS // 8  # a scale and a zero


@dataclass(frozen=True)
class KeyValue:
    """Keys and values in codes of so many bits."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadInput(f"a KV cache in {self.bits} bits is not known; choose from {', '.join(map(str, BITS))}")

    def __str__(self) -> str:
        return f"kv{self.bits}"


CacheScheme = Keep | KeyValue


@dataclass(frozen=True)
class Cache:
    """The KV cache of one attention module, by whose name it goes.

    Per token it holds `heads` × `key_width` and `heads` × `value_width` numbers of `dtype_bytes`. With a sliding
    `window` only so many tokens are seen. `block` is the index of the repeated block that holds it, or None.
    """

    name: str
    heads: int
    key_width: int
    value_width: int
    dtype_bytes: int
    window: int | None = None
    block: int | None = None

    def nbytes(self, scheme: CacheScheme, tokens: int) -> int:
        """Bytes of one sequence's cache once it holds `tokens` tokens.

        Of a sliding window a group of keys goes when none of its tokens is seen any more, values one by one.
        """
        first = 0 if self.window is None else max(0, tokens - self.window)  # the oldest token that is seen
        if isinstance(scheme, Keep):
            return (tokens - first) * self.heads * (self.key_width + self.value_width) * self.dtype_bytes
        groups, tail = tokens // GROUP - first // GROUP, tokens % GROUP
        key = groups * (GROUP * scheme.bits // 8 + _GRID_BYTES) + tail * self.dtype_bytes
        value = (self.value_width * scheme.bits + 7) // 8 + _GRID_BYTES
        return self.heads * (self.key_width * key + (tokens - first) * value)


def summary(bits: int) -> str:
    """One line on a cache of so many bits, as the command line lists it among the methods."""
    return f"KV cache in {bits} bits (space.kv_cache): keys per channel of {GROUP} tokens, values per token and head"


def parse_key_value(text: str) -> KeyValue | None:
    """The scheme of a cache that `text` names, None where it names something else. Raises `BadInput`."""
    found = _TEXT.fullmatch(text)
    return KeyValue(int(found[1])) if found else None


def parse_choice(text: str) -> Scheme | KeyValue:
    """The scheme of a layer or of a cache. Raises `BadInput`."""
    return parse_key_value(text) or parse_scheme(text)
