"""A measured number with its unit, its error and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["measured", "predicted", "computed"]
Part = Literal["search", "report"]


@dataclass(frozen=True)
class Measurement:
    """One objective's value for one assignment.

    `stderr` is the standard error of `value` in the same unit, None where the value is exact.
    `n` is the number of samples behind it (tokens for quality, timed runs for latency).
    `kind` says how it was obtained; a prediction is never shown as a measurement.
    `part` is the data (or the stage) it belongs to: `search` values steer the search, `report`
    values were taken afterwards and never seen by a sampler.
    `detail` holds provenance that differs by objective: kernel, threads, instruction set, spread.
    `per_token` (windows, tokens) float32 are the values whose mean this is, NaN where a token was not
    evaluated or does not count. They are stored beside the measurement and not read with it.
    """

    objective: str
    value: float
    unit: str
    kind: Kind
    part: Part
    stderr: float | None = None
    n: int = 1
    device: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    per_token: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The shape that the CLI, the API and Python return, without the objective's name."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "unit": self.unit,
            "kind": self.kind,
            "part": self.part,
            "n": self.n,
            "device": self.device,
            "detail": dict(self.detail),
        }

    @classmethod
    def from_json(cls, objective: str, document: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`. Raises `KeyError` or `TypeError` for another shape."""
        return cls(objective=objective, **document)


@dataclass(frozen=True)
class Comparison:
    """A runtime against the search, on the same `tokens` of the report part.

    `here` is the quality as the search evaluates it, `there` what the runtime's outputs come to.
    `apart` is the mean KL, in nats per token, of the runtime's distribution from the search's, and `moved`
    that of the search's from the unquantized model's; for an encoder without a head mean cosine distances.
    `paired` is per objective the standard error of the difference of `there` and `here`, token by token.
    """

    here: list[Measurement]
    there: list[Measurement]
    apart: float
    moved: float
    paired: dict[str, float]
    tokens: int


@dataclass(frozen=True)
class Probe:
    """What one layer under one scheme costs when all others keep their weights: mean `loss` over `tokens`.

    KL in nats per token, for an encoder without a head cosine distance, with its standard error.
    `forward_passes` over these tokens is what it took.
    """

    loss: float
    stderr: float | None
    tokens: int
    forward_passes: float
