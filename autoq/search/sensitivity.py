"""Sensitivities: the loss that each layer is predicted to cost under each scheme, made once for all studies.

They depend on the model, the calibration data and the method, and on nothing else of a study. So the
database keeps them under the name of the statistics that they come from, one table per method and its
version, and a study computes only what no earlier one has computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from autoq import plugins
from autoq.methods import Method
from autoq.scheme import parse_scheme
from autoq.search.executors import Executor, Job
from autoq.search.observer import Observer
from autoq.search.stages import run_job, run_jobs
from autoq.store import Store

LAYERS_PER_JOB = 7  # one block of a Llama: small enough for a smooth progress bar

Losses = dict[str, dict[str, float]]  # layer -> scheme text -> predicted loss


def gather(choices: Mapping[str, Sequence[str]], store: Store, executor: Executor, observer: Observer) -> Losses:
    """Layer -> scheme -> predicted loss, for all of `choices` (layer -> scheme texts).

    What an interrupted pass has found is kept too.
    """
    observer.stage("calibrate", 1)
    statistics = Path(run_job(executor, Job("calibrate", "calibrate", exclusive=True)).value).stem
    observer.advance()
    shared = _Shared(store, statistics)
    known = shared.load({text for texts in choices.values() for text in texts})
    missing = {
        layer: wanted
        for layer, texts in choices.items()
        if (wanted := [text for text in texts if text not in known.get(layer, {})])
    }
    if missing:
        observer.stage("quantize", len(missing))
        found: Losses = {}
        try:
            for result in run_jobs(executor, _jobs(missing)):
                found |= result.value
                observer.advance(len(result.value))
        finally:
            shared.add(found)
        known = _merged(known, found)
    return {layer: {text: known[layer][text] for text in texts} for layer, texts in choices.items()}


def _jobs(choices: Mapping[str, Sequence[str]]) -> list[Job]:
    layers = list(choices)
    batches = [layers[i : i + LAYERS_PER_JOB] for i in range(0, len(layers), LAYERS_PER_JOB)]
    return [
        Job(f"sensitivities-{i}", "sensitivities", {"choices": {layer: choices[layer] for layer in batch}})
        for i, batch in enumerate(batches)
    ]


def _merged(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]) -> Losses:
    return {layer: {**a.get(layer, {}), **b.get(layer, {})} for layer in dict.fromkeys([*a, *b])}


class _Shared:
    """The tables of one file of statistics in the database, one per method."""

    def __init__(self, store: Store, statistics: str) -> None:
        self.store, self.statistics = store, statistics

    def _key(self, method: str) -> str:
        return f"{self.statistics}-{method}-{plugins.load('methods', method, Method).version}"

    def load(self, schemes: Iterable[str]) -> Losses:
        """All that is known of the methods of `schemes`."""
        known: Losses = {}
        for method in {parse_scheme(text).method for text in schemes}:
            known = _merged(known, self.store.sensitivities(self._key(method)) or {})
        return known

    def add(self, found: Losses) -> None:
        """Put `found` beside what is there. Of two studies that do so at once, one may have to find its own again."""
        by_method: dict[str, Losses] = {}
        for layer, losses in found.items():
            for text, loss in losses.items():
                by_method.setdefault(parse_scheme(text).method, {}).setdefault(layer, {})[text] = loss
        for method, losses_of in by_method.items():
            key = self._key(method)
            self.store.put_sensitivities(key, _merged(self.store.sensitivities(key) or {}, losses_of))
