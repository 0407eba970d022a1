"""What a study's own numbers say of it, while it runs: kept, and brought up to date by what changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from autoq.display.compare import quality_objective
from autoq.measurement import Part
from autoq.store import Store, StudyObjective, TrialRecord
from autoq.store.feed import Stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoq.display.ties import KnownTies

Ties = dict[int, list[int]]

_KEPT = 64


class Views:
    """Per study the pairs of predicted and measured quality that are known, and up to which change."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pairs: OrderedDict[int, tuple[int, dict[int, tuple[float, float]]]] = OrderedDict()
        self._ties: OrderedDict[int, tuple[KnownTies, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()

    def ties(self, study: Stamp, objectives: tuple[StudyObjective, ...], points: list[TrialRecord]) -> Ties:
        """`display.ties.ties` of the whole frontier; what was compared before is not compared again."""
        from autoq.display.ties import KnownTies

        store = self.store
        valued = store.feed.valued(study.id)

        def values(number: int, name: str, part: Part) -> NDArray[np.float32] | None:
            there = (number, name, part) in valued
            return store.token_values(study.id, number, name, part) if there else None

        with self._lock:
            known, turn = self._ties.setdefault(study.id, (KnownTies(), threading.Lock()))
            self._ties.move_to_end(study.id)
            while len(self._ties) > _KEPT:
                self._ties.popitem(last=False)
        with turn:
            return known.update(points, objectives, values)

    def hindsight(self, study: Stamp, objectives: tuple[StudyObjective, ...]) -> dict[str, Any]:
        """`{"optimism", "sampler_view"}`, as `display.hindsight` has it, without reading all trials each time."""
        from autoq.search.sampler_view import SamplerView, view_of_pairs

        tables = self.store.feed.tables([study.id], ("optimism", "sampler_view"))
        stored = tables.get((study.id, "sampler_view"))
        view = None if stored is None else SamplerView(**stored)
        quality = quality_objective(objectives)
        if study.state != "finished" and quality is not None:
            view = view_of_pairs(list(self._known(study, quality.name).values()))
        return {
            "optimism": tables.get((study.id, "optimism")),
            "sampler_view": None if view is None else view.to_json(),
        }

    def _known(self, study: Stamp, quality: str) -> dict[int, tuple[float, float]]:
        with self._lock:
            seen, pairs = self._pairs.get(study.id, (-1, {}))
        if seen < study.changes:
            # What is read now may be newer than the stamp; reading it again later changes nothing.
            pairs = pairs | self.store.feed.predictions(study.id, quality, seen)
            with self._lock:
                self._pairs[study.id] = study.changes, pairs
                self._pairs.move_to_end(study.id)
                while len(self._pairs) > _KEPT:
                    self._pairs.popitem(last=False)
        return dict(sorted(pairs.items()))
