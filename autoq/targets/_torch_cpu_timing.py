"""Timing a transformers model on its workload: whole, and layer by layer in place.

A round is one prefill of the prompt into a fresh cache, then some decode steps of one token per
sequence on that cache. So the context at decode time is the prompt and at most `STEPS` tokens, the
same for every assignment, and any kind of cache that transformers has will do.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoq import device
from autoq.errors import ModelRefused, SpecError
from autoq.layer import ONE_PASS
from autoq.measurement import Measurement
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED
from autoq.targets._torch_cpu_assembly import Forward, installed

PREFILL, DECODE = "latency_prefill_ms", "latency_decode_ms"
STEPS = 16
QUIET = 25  # percentile
BASE_STEPS = 8  # of the unquantized model, which only has to tell how fast the machine is now
MIN_ROUNDS, MAX_ROUNDS = 2, 12
ROUNDS_SECONDS = 1.5  # rounds go on beyond the least until they have taken this long


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run PyTorch on `count` threads (None: as many as this machine has cores), then on as many as before.

    Not as many as now: a worker among others has its share of the cores, what is deployed has them all.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or device.threads())
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Session:
    """The workload on one model: `prefill` gives a state, `step` takes a state one token further.

    Decoder-only models prefill the prompt and compute the logits of its last position only, where
    the architecture can. Encoder-decoders prefill the encoder and the decoder's start token, and a
    step is the decoder's. Encoders, masked models and classifiers have no steps; those of images read a batch of them.
    """

    def __init__(self, model: LoadedModel, workload: TargetSpec) -> None:
        info, self._task = model.info, model.info.task
        self.phases = (PREFILL,) if self._task in ONE_PASS else (PREFILL, DECODE)
        steps = STEPS + 1 if self._task == "causal" else 0
        if info.max_positions is not None and workload.prompt_tokens + steps > info.max_positions:
            raise SpecError(
                f"target.prompt_tokens: {workload.prompt_tokens} is too long for a model of {info.max_positions} "
                f"positions; at most {max(1, info.max_positions - steps)}"
            )
        self._model = model.model
        generator = torch.Generator().manual_seed(0)
        self._images: Tensor | None = None
        if info.images is not None:
            pixels = (workload.batch_size, info.images.channels, info.images.height, info.images.width)
            dtype = getattr(torch, info.dtype)
            self._images = torch.randn(pixels, generator=generator).to(model.device, dtype)
            return
        shape = (workload.batch_size, workload.prompt_tokens)
        self._prompt = torch.randint(info.vocab_size, shape, generator=generator).to(model.device)
        self._token = self._prompt[:, -1:].clone()
        parameters = inspect.signature(self._model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        if self._task == "seq2seq":
            config: Any = self._model.config
            self._extra["decoder_input_ids"] = torch.full_like(self._token, config.decoder_start_token_id or 0)

    def prefill(self) -> dict[str, Any]:
        """Run the prompt; returns what the next step needs."""
        if self._images is not None:
            self._model(pixel_values=self._images)
            return {}
        if self._task in ONE_PASS:
            self._model(input_ids=self._prompt)
            return {}
        output = self._model(input_ids=self._prompt, use_cache=True, **self._extra)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ModelRefused(f"{type(self._model).__name__} gives back no key-value cache, so it cannot be timed")
        if self._task == "seq2seq":
            return {
                "past_key_values": cache,
                "encoder_outputs": (output.encoder_last_hidden_state,),
                "decoder_input_ids": self._token,
            }
        return {"past_key_values": cache, "input_ids": self._token}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        """Run one token per sequence on the cache in `state`; returns the state after it."""
        output = self._model(use_cache=True, **state)
        return {**state, "past_key_values": output.past_key_values}


@dataclass
class Samples:
    """Milliseconds of single runs, wall and CPU (summed over threads), in the order they ran."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    @property
    def quiet_ms(self) -> float:
        """Lower quartile of the wall time: whatever else the machine does only adds to it."""
        return float(np.percentile(self.wall_ms, QUIET))

    @property
    def stderr_ms(self) -> float:
        """Standard error of a quartile, 1.36 σ/√n as for normal noise. Spikes make it larger."""
        return float(1.36 * np.std(self.wall_ms, ddof=1) / np.sqrt(len(self.wall_ms)))

    def spread(self) -> dict[str, float]:
        """Median, interquartile range and least wall time, and the median CPU time, in milliseconds."""
        low, middle, high = np.percentile(self.wall_ms, [25, 50, 75])
        return {
            "median_ms": round(float(middle), 4),
            "iqr_ms": round(float(high - low), 4),
            "min_ms": round(min(self.wall_ms), 4),
            "cpu_ms": round(float(np.median(self.cpu_ms)), 4),
        }


@contextmanager
def _sampled(samples: Samples) -> Iterator[None]:
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    yield
    samples.wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
    samples.cpu_ms.append((time.process_time_ns() - cpu) / 1e6)


@dataclass
class Turns:
    """Runs of a candidate and of the unquantized model in turns, phase -> samples.

    `ratios` has one number per round and phase: the candidate's lower quartile over the unquantized model's.
    """

    candidate: dict[str, Samples]
    unquantized: dict[str, Samples]
    ratios: dict[str, list[float]]

    def relative_error(self, phase: str) -> float:
        """Relative standard error of the candidate's latency at a steady speed of the machine: that of the
        mean ratio, or of its own runs where that is larger (one round tells nothing of drift)."""
        ratios = self.ratios[phase]
        spread = float(np.std(ratios, ddof=1) / np.mean(ratios) / np.sqrt(len(ratios))) if len(ratios) > 1 else 0.0
        samples = self.candidate[phase]
        return max(spread, samples.stderr_ms / samples.quiet_ms if len(samples.wall_ms) > 2 else 0.0)

    def measurements(self, detail: Mapping[str, Any]) -> list[Measurement]:
        """One end-to-end latency per phase, with `detail` beside its spread."""
        return [
            Measurement(
                phase,
                samples.quiet_ms,
                "ms",
                "measured",
                "report",
                stderr=samples.quiet_ms * self.relative_error(phase),
                n=len(samples.wall_ms),
                device=device.fingerprint(),
                detail={**detail, **samples.spread(), UNQUANTIZED: self.unquantized[phase].quiet_ms},
            )
            for phase, samples in self.candidate.items()
        ]


@torch.no_grad()
def time_in_turns(session: Session, forwards: Sequence[tuple[nn.Module, Forward]], patience: int = 1) -> Turns:
    """Time whole runs of the model with `forwards` installed and without, round by round in turns, after
    one round each that warms up. `patience` multiplies the time.

    A machine's speed drifts over minutes by more than its runs vary, and it drifts for both: their ratio
    stays. No gradients but no inference mode either: what a model caches in there could not be used for
    a backward pass later.
    """
    phases = session.phases
    turns = Turns({p: Samples() for p in phases}, {p: Samples() for p in phases}, {p: [] for p in phases})
    for packed in (forwards, ()):
        with installed(packed):
            _run_round(session, {phase: Samples() for phase in session.phases}, 4)
    start = time.perf_counter()
    for number in range(MAX_ROUNDS * patience):
        if number >= MIN_ROUNDS * patience and time.perf_counter() - start > ROUNDS_SECONDS * patience:
            break
        with installed(forwards):
            own = _run_round(session, turns.candidate, STEPS)
        base = _run_round(session, turns.unquantized, BASE_STEPS)
        for phase in session.phases:
            turns.ratios[phase].append(own[phase] / base[phase])
    return turns


def _run_round(
    session: Session,
    samples: Mapping[str, Samples],
    steps: int,
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """One round; adds to `samples` and gives back the round's own lower quartiles in milliseconds. `after` is
    called with the phase after every run."""
    with _sampled(samples[PREFILL]):
        state = session.prefill()
    after(PREFILL)
    if DECODE in session.phases:
        for _ in range(steps):
            with _sampled(samples[DECODE]):
                state = session.step(state)
            after(DECODE)
    count = {PREFILL: 1, DECODE: steps}
    return {phase: float(np.percentile(samples[phase].wall_ms[-count[phase] :], QUIET)) for phase in session.phases}


@dataclass
class InPlace:
    """One model timed layer by layer, phase -> milliseconds.

    `layers` has for each layer what its forwards took per run, summed over its modules; `whole` the model's
    lower quartile per round.
    """

    layers: dict[str, dict[str, list[float]]]
    whole: dict[str, list[float]]


@dataclass
class LayerTurns:
    """A candidate and the unquantized model, layer by layer in turns."""

    candidate: InPlace
    unquantized: InPlace


Forwards = Mapping[str, Sequence[tuple[nn.Module, Forward]]]  # layer -> its modules and what runs as their forward


@torch.no_grad()
def time_layers(session: Session, forwards: Forwards, kept: Forwards, rounds: int) -> LayerTurns:
    """Time the model with `forwards` installed, layer by layer, in turns with the unquantized model, whose own
    forwards are `kept`.

    Every layer runs where it always runs: with the caches as its neighbours left them and between
    the other operations of the model. A layer that a phase does not call takes 0.
    """
    phases = session.phases
    with installed([pair for pairs in forwards.values() for pair in pairs]):
        _run_round(session, {phase: Samples() for phase in phases}, 2)
    turns = [
        InPlace({p: {name: [] for name in own} for p in phases}, {p: [] for p in phases}) for own in (forwards, kept)
    ]
    for _ in range(rounds):
        for found, own, steps in zip(turns, (forwards, kept), (STEPS, BASE_STEPS), strict=True):
            _clocked_round(session, found, own, steps)
    return LayerTurns(*turns)


def _clocked_round(session: Session, found: InPlace, forwards: Forwards, steps: int) -> None:
    """Add one round of the model with `forwards` installed to `found`."""
    spent = dict.fromkeys(forwards, 0)

    def collect(phase: str) -> None:
        for name, nanoseconds in spent.items():
            found.layers[phase][name].append(nanoseconds / 1e6)
            spent[name] = 0

    wrapped = [(module, _clocked(run, spent, name)) for name, pairs in forwards.items() for module, run in pairs]
    with installed(wrapped):
        whole = _run_round(session, {phase: Samples() for phase in found.whole}, steps, collect)
    for phase, milliseconds in whole.items():
        found.whole[phase].append(milliseconds)


def _clocked(run: Forward, spent: dict[str, int], name: str) -> Forward:
    clock = time.perf_counter_ns

    def forward(*inputs: Tensor, **options: Any) -> Any:
        start = clock()
        output = run(*inputs, **options)
        spent[name] += clock() - start
        return output

    return forward
