"""Joules per decoded token at the spec's batch size; per input token for a model that decodes nothing.

While searching it is computed from operations and bytes and the target's constants. In the report it is
metered, where the target runs on this machine and the machine has counters that can be read.
"""

from __future__ import annotations

from autoq.assignment import Assignment
from autoq.energy import work
from autoq.energy.estimate import Estimate
from autoq.layer import ModelInfo
from autoq.objectives import EnergyObjective
from autoq.spec import TargetSpec
from autoq.targets import Target


class EnergyJoulePerToken(EnergyObjective):
    """Energy of one token."""

    unit = "J"

    def refuses(self, info: ModelInfo) -> str | None:
        """A model whose operations and bytes cannot be counted, or None."""
        return work.refuses(info)

    def estimate(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec, target: Target) -> Estimate:
        """See `EnergyObjective.estimate`."""
        return target.estimated_energy(info, assignment, workload)
