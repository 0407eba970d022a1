"""Integer schemes as recipes of other tools say them: width, group size, symmetry."""

from __future__ import annotations

from collections.abc import Sequence

from autoq import plugins
from autoq.errors import BadInput
from autoq.recipes._files import Section
from autoq.scheme import Activation, Granularity, Integer, PerChannel, PerGroup, Scheme, ZeroPoint

# Such a recipe says how a layer is represented; the weights are made anew, by the first of these that can.
_METHODS = ("gptq", "rtn")


def group_granularity(section: Section, field: str, default: int | None = None) -> Granularity:
    """A group size: so many inputs, or with -1 the whole output row. Raises `BadInput`."""
    size = section.whole(field, default)
    if size == -1:
        return PerChannel()
    try:
        return PerGroup(size)
    except BadInput:
        section.refuse(field, "must be at least 2, or -1 for one group per output row")


def integers(
    section: Section, field: str, granularity: Granularity, symmetric: bool, activation: Activation | None = None
) -> Sequence[Scheme]:
    """The integer schemes whose bits stand in a field, the preferred method first. Raises `BadInput`."""
    bits = section.whole(field)
    zero: ZeroPoint = "none" if symmetric else "integer"
    try:
        return [Integer(m, bits, granularity, zero, activation) for m in _METHODS if m in plugins.names("methods")]
    except BadInput as problem:
        raise BadInput(f"{section.name(field)}: {problem}") from None
