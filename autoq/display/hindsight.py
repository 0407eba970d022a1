"""What a study's own numbers say of it: how far its selection was lucky, how well its sampler foresaw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoq.display.compare import quality_objective
from autoq.display.numbers import counted
from autoq.search.sampler_view import ENDED, SamplerView, sampler_view

if TYPE_CHECKING:
    from autoq.store import Store, StudyRecord


@dataclass(frozen=True)
class Hindsight:
    """The table `optimism` of a study, and its sampler's view; None where there are no numbers for it."""

    optimism: Mapping[str, Any] | None
    sampler_view: SamplerView | None

    def to_json(self) -> dict[str, Any]:
        """`{"optimism", "sampler_view"}`."""
        view = None if self.sampler_view is None else self.sampler_view.to_json()
        return {"optimism": self.optimism, "sampler_view": view}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Hindsight:
        """The inverse of `to_json`; what else the document has is left alone."""
        view = document["sampler_view"]
        return cls(document["optimism"], None if view is None else SamplerView(**view))

    def lines(self) -> list[str]:
        """A line for each."""
        found = []
        if self.optimism is not None:
            error = self.optimism["stderr"]
            ratio = f"{self.optimism['ratio']:.3f}" + ("" if error is None else f" ±{error:.3f}")
            points, baselines = len(self.optimism["frontier"]), len(self.optimism["baselines"])
            found.append(
                f"optimism: {self.optimism['objective']} of {counted(points, 'frontier point')}, report against "
                f"search part, is {ratio} × that of {counted(baselines, 'baseline')}"
            )
        if self.sampler_view is not None:
            found.append(str(self.sampler_view))
        return found


def hindsight(store: Store, study: StudyRecord) -> Hindsight:
    """As the report left it. A study that has none yet is asked for its sampler's view as it stands."""
    stored = store.table(study.id, "sampler_view")
    view = None if stored is None else SamplerView(**stored)
    quality = quality_objective(study.objectives)
    if study.state != "finished" and quality is not None:
        view = sampler_view(store.trials(study.id, states=ENDED), quality.name)
    return Hindsight(store.table(study.id, "optimism"), view)


def stored_hindsight(store: Store, study_id: int) -> Hindsight:
    """As the report left it, without a look at any trial: for lists of studies."""
    view = store.table(study_id, "sampler_view")
    return Hindsight(store.table(study_id, "optimism"), None if view is None else SamplerView(**view))
