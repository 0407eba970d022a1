"""Quantized KV caches in a model that runs: what attention reads in place of the keys and values that it was given.

The way in is the function that transformers lets every attention module choose by its config: a module whose cache is
quantized gets a copy of its config that names ours, `NAME`. So whatever the module does before, projections in one
piece, norms, rotation, keys and values arrive here as they would be stored, and all other modules run as they did.

A window of text is read in one pass, and position t must read what a runtime that goes token by token would: it stores
its own key and value first and reads then. Of t + 1 tokens the keys of ⌊(t + 1) / 32⌋ whole groups are codes by then
and the others are as they were. Both are laid side by side, and the mask shows each query one of them:

    keys     [K', K]      K' of whole groups dequantized      mask   [M ∧ (⌊j / 32⌋ < ⌊(t + 1) / 32⌋), M ∧ not that]
    values   [V', V']     V' dequantized

with M the module's own mask (causal, sliding) and j the key's token. That is exact: outputs are those of a cache that
is filled one token at a time, also of one that is filled by a prompt in one pass and read afterwards. KIVI reads a
prompt in full precision while it fills the cache, and its last token before it is stored: it loses less there.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoq.kv_cache import GROUP

NAME = "autoq-kv"

# (keys, values), each (batch, heads, tokens, width) -> the same as they are read from the cache.
Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Who is told of keys, values and the sliding window of a module's attention.
See = Callable[[Tensor, Tensor, int | None], None]
_Attention = Callable[..., tuple[Tensor, Tensor | None]]

_MIN_SCALE = torch.finfo(torch.bfloat16).tiny


def grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row of `x` (…, n) as (…, 1), float32 numbers that bfloat16 holds.

    The zero is rounded down and the scale up, so the levels cover the row: no number of it moves by more than half a
    step, but for the rounding of float32. What is not finite stays so.
    """
    low, high = (end.float() for end in torch.aminmax(x, dim=-1, keepdim=True))
    zero = _rounded(low, up=False)
    top = 2**bits - 1
    # Divided before subtracting: the range of finite numbers need not be finite.
    scale = _rounded(high / top - zero / top, up=True).clamp(min=_MIN_SCALE)
    return scale, zero


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of the nearest levels, float32 whole numbers."""
    return ((x.float() - zero) / scale).round_().clamp_(0, 2**bits - 1)


def dequantized(x: Tensor, bits: int) -> Tensor:
    """`x` (…, n) as it is read back, in its own dtype; every row has a grid of its own."""
    scale, zero = grid(x, bits)
    return (encode(x, scale, zero, bits) * scale + zero).to(x.dtype)


def _rounded(x: Tensor, up: bool) -> Tensor:
    """float32 numbers that bfloat16 holds, the nearest that are no less, or no more."""
    near = x.to(torch.bfloat16)
    wrong = near.float() < x if up else near.float() > x
    towards = torch.full_like(near, torch.inf if up else -torch.inf)
    return torch.where(wrong, torch.nextafter(near, towards), near).float()


def read_keys(keys: Tensor, bits: int) -> Tensor:
    """Keys (batch, heads, tokens, width) as read from the cache: whole groups dequantized, what is left as it is."""
    tokens = keys.shape[2]
    whole = tokens // GROUP * GROUP
    if not whole:
        return keys
    batch, heads, _, width = keys.shape
    grouped = keys[:, :, :whole].reshape(batch, heads, -1, GROUP, width).transpose(3, 4)
    back = dequantized(grouped, bits).transpose(3, 4).flatten(2, 3)
    return torch.cat([back, keys[:, :, whole:]], dim=2)


def read(bits: int) -> Read:
    """What is read from a cache of so many bits. Gradients pass as if nothing had been rounded."""
    return functools.partial(_read, bits)


def _read(bits: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = read_keys(keys, bits), dequantized(values, bits)
    if not torch.is_grad_enabled():
        return found
    return found[0] + (keys - keys.detach()), found[1] + (values - values.detach())


def install(module: Any, read: Read | None, see: See | None = None) -> None:
    """Let an attention module read what `read` makes of its keys and values (None: themselves), and tell `see`."""
    own = copy.copy(module.config)
    module.autoq_cache = (read, see, module.config)
    own._attn_implementation_internal = NAME
    module.config = own


def remove(module: Any) -> None:
    """Let the module read its own keys and values again."""
    *_, module.config = module.autoq_cache
    del module.autoq_cache


def can_read(module: Any) -> bool:
    """Whether a module may be one that `install` is for: it chooses its attention by a config."""
    return hasattr(getattr(module, "config", None), "_attn_implementation_internal")


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """The module's own attention over [K', K] and [V', V']."""
    read, see, config = module.autoq_cache
    function: _Attention = _own_attention(module, config._attn_implementation_internal)
    if see is not None:
        see(key, value, others.get("sliding_window"))
    if read is None:
        return function(module, query, key, value, attention_mask, **others)
    seen_keys, seen_values = read(key, value)
    tokens = key.shape[2]
    stored = torch.arange(tokens - query.shape[2] + 1, tokens + 1, device=key.device)[:, None]  # when a query reads
    place = torch.arange(tokens, device=key.device)
    coded = place // GROUP < stored // GROUP  # (queries, tokens)
    mask = place < stored if attention_mask is None else attention_mask[..., :tokens]
    if mask.dtype is torch.bool:
        both = torch.cat([mask & coded, mask & ~coded], dim=-1)
    else:
        hidden = torch.finfo(mask.dtype).min
        both = torch.cat([mask.masked_fill(~coded, hidden), mask.masked_fill(coded, hidden)], dim=-1)
    while both.dim() < 4:
        both = both.unsqueeze(0)
    return function(
        module, query, torch.cat([seen_keys, key], 2), torch.cat([seen_values, seen_values], 2), both, **others
    )


def _own_attention(module: nn.Module, name: str) -> _Attention:
    """The attention that the module would run by its own config."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    # The eager one is the architecture's own.
    found: _Attention = sys.modules[type(module).__module__].eager_attention_forward
    return found


AttentionInterface.register(NAME, _attend)
