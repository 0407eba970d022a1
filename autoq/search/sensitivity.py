"""Sensitivities: the predicted loss of each layer and KV cache under each scheme, made once for all studies.

They depend on the model, the calibration data and the method, and on nothing else of a study; with quantized
activations also on the target, whose kernel says whose range it is and what that is spread over. So the database
keeps them under the name of the statistics that they come from, one table per method and its version, and a study
computes only what no earlier one has computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from autoq import plugins
from autoq.kv_cache import VERSION, KeyValue, parse_choice
from autoq.methods import Method
from autoq.scheme import kernel_activation
from autoq.search.executors import Executor, Job
from autoq.search.observer import Observer
from autoq.search.stages import run_job, run_jobs
from autoq.store import Store

LAYERS_PER_JOB = 7  # one block of a Llama: small enough for a smooth progress bar

Losses = dict[str, dict[str, float]]  # layer -> scheme text -> predicted loss


def gather(
    choices: Mapping[str, Sequence[str]], target: str, store: Store, executor: Executor, observer: Observer
) -> Losses:
    """Layer -> scheme -> predicted loss, for all of `choices` (layer -> scheme texts) on the target of that name.

    What an interrupted pass has found is kept too.
    """
    observer.stage("calibrate", 1)
    statistics = Path(run_job(executor, Job("calibrate", "calibrate", exclusive=True)).value).stem
    observer.advance()
    shared = _Shared(store, statistics, target)
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
    """The tables of one file of statistics in the database, one per method, and per target where that counts."""

    def __init__(self, store: Store, statistics: str, target: str) -> None:
        self.store, self.statistics, self.target = store, statistics, target

    def _key(self, text: str) -> str:
        scheme = parse_choice(text)
        if isinstance(scheme, KeyValue):
            return f"{self.statistics}-kv-{VERSION}"
        key = f"{self.statistics}-{scheme.method}-{plugins.load('methods', scheme.method, Method).version}"
        return f"{key}-{self.target}" if kernel_activation(scheme) is not None else key

    def load(self, schemes: Iterable[str]) -> Losses:
        """All that is known of the methods of `schemes`."""
        known: Losses = {}
        for key in {self._key(text) for text in schemes}:
            known = _merged(known, self.store.sensitivities(key) or {})
        return known

    def add(self, found: Losses) -> None:
        """Put `found` beside what is there. Of two studies that do so at once, one may have to find its own again."""
        by_key: dict[str, Losses] = {}
        for layer, losses in found.items():
            for text, loss in losses.items():
                by_key.setdefault(self._key(text), {}).setdefault(layer, {})[text] = loss
        for key, losses_of in by_key.items():
            self.store.put_sensitivities(key, _merged(self.store.sensitivities(key) or {}, losses_of))
