"""A measured number with its unit, its error and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
