"""Granularities: which weights share a scale. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from autoq.errors import BadInput


@dataclass(frozen=True, order=True)
class PerTensor:
    """One set of parameters for the whole weight."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True, order=True)
class PerChannel:
    """One set of parameters per output row."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True, order=True)
class PerGroup:
    """One set of parameters per `size` consecutive inputs of an output row."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise BadInput(f"group size {self.size} is too small; the least is 2")

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True, order=True)
class PerBlock:
    """One set of parameters per `rows` outputs by `columns` inputs; blocks at the ends may be smaller."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 2:
            raise BadInput(f"block {self.rows}x{self.columns} is too small; the least is 2x2")

    def __str__(self) -> str:
        return f"b{self.rows}x{self.columns}"


Granularity = PerTensor | PerChannel | PerGroup


def groups_per_row(granularity: Granularity, in_features: int) -> int:
    """Parameter sets per row. A group size must divide the row; who asks has checked that."""
    if isinstance(granularity, PerGroup):
        assert in_features % granularity.size == 0, (granularity, in_features)
        return in_features // granularity.size
    return 1


def parse_granularity(text: str) -> Granularity:
    """That of a scheme's text: `tensor`, `channel` or `gSIZE`. Raises `BadInput`."""
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    if text.startswith("g0"):
        raise BadInput(f"group size in {text!r} must not start with 0")
    return PerGroup(int(text[1:]))


def parse_block(text: str) -> PerBlock | None:
    """The block that `bROWSxCOLUMNS` names; None for another granularity. Raises `BadInput`."""
    rows, by, columns = text[1:].partition("x")
    return PerBlock(int(rows), int(columns)) if text.startswith("b") and by else None
