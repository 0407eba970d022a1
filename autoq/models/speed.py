"""How fast this machine is at what a model is made of, tried in a moment: matrix products and distributions.

Seconds are of the processor, over the threads: what others do on the machine at that moment is not in them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_TOKENS, _MOST = 512, 4096  # rows of a product's left side, and at most so many rows and columns of its right side


def products(out_features: int, in_features: int, dtype: str, threads: int) -> float:
    """Operations a second of a linear of such a shape on 512 tokens."""
    out, inputs = min(out_features, _MOST), min(in_features, _MOST)
    x, weight = (torch.ones(rows, inputs, dtype=getattr(torch, dtype)) for rows in (_TOKENS, out))
    with _threads(threads):
        return 2.0 * _TOKENS * out * inputs / fastest(lambda: torch.nn.functional.linear(x, weight), threads)


def answers(vocabulary: int, threads: int) -> float:
    """Seconds for one entry of a token's logits: two distributions, and how far one is from the other."""
    logits = torch.zeros(64, vocabulary)

    def judge() -> Tensor:
        own, other = logits.log_softmax(-1), logits.log_softmax(-1)
        return (other.exp() * (other - own)).sum(-1)

    with _threads(threads):
        return fastest(judge, threads) / logits.numel()


def random_weight(out_features: int, in_features: int) -> Tensor:
    """Normal numbers (out, in), the same each time."""
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def fastest(work: Callable[[], object], threads: int = 1, times: int = 5) -> float:
    """Seconds of the fastest of a few runs on so many threads, after one more run: caches are warm then."""
    work()
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append((time.process_time() - start) / threads)
    return max(min(found), 1e-9)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
