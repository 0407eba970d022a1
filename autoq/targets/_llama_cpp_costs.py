"""The latency table of a model in llama.cpp, from whole files timed in turns with the unquantized model.

llama.cpp gives out no time of a single layer, and a layer timed alone would come out wrong anyway (see
`_torch_cpu_costs`). What can be timed is a file, and its time is a sum over layers: so a handful of files
and least squares tell what each type costs on each kind of layer. Two sweeps of files are timed, each with
as many files as there are types: in the first all layers are of one type (of the nearest size where a layer
cannot have it), which tells what a type costs; in the second every kind of layer runs through its types in
an order of its own, which tells the kinds apart.

Unknown are the differences from the kept layer. For work w of a layer (multiplications that use its
weights, as a share of the model's) and type t, in units of the unquantized model's latency T,

    file / unquantized - 1 = Σ_layers w (a_t + e_kind,t) + noise

minimized over a and e with e shrunk towards 0, that is, to cost in proportion to weights: there are more
kinds times types than files. Only differences can be seen in whole files, and only they decide between
assignments of a model; so its own layers share the whole of T by their work, and the base is what remains
for layers that are not in the table. The sum over the unquantized model is T, as it was measured.

Time depends on a type and a shape, not on the numbers: schemes of one type are timed once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoq.device import fingerprint
from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.scheme import Gguf
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED, CostTable
from autoq.targets._llama_cpp_timing import PHASES, Bench, add, no_samples
from autoq.targets._torch_cpu_timing import BASE_STEPS, PREFILL, STEPS

KEEP = "keep"
_ROUNDS = 2  # of each file
_NOISE, _APART = 0.01, 0.15  # standard deviations: of a file's ratio, and of a kind's e, in units of its share
_NEIGHBOURS = 2  # files on either side whose unquantized rounds tell the machine's speed

Deal = dict[str, str]  # layer -> type


def type_of(weight: QuantizedWeight) -> str:
    """The GGUF type that a weight lies in a file as, or `keep`."""
    return weight.scheme.type if isinstance(weight.scheme, Gguf) else KEEP


@dataclass(frozen=True)
class _Kind:
    """Layers of one shape and use with the same types to time, which are sorted by size."""

    layers: tuple[Layer, ...]
    types: tuple[str, ...]


def _kinds(layers: Sequence[Layer], types: Mapping[str, Sequence[str]]) -> list[_Kind]:
    members: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        key = (layer.kind, bool(layer.tied), layer.out_features, layer.in_features, tuple(types[layer.name]))
        members.setdefault(key, []).append(layer)
    return [_Kind(tuple(group), tuple(types[group[0].name])) for group in members.values()]


def _bits(layer: Layer, kind: str) -> float:
    size = layer.dtype_bytes if kind == KEEP else Gguf(kind).nbytes(1, layer.in_features, 0) / layer.in_features
    return 8 * size


def deals(kinds: Sequence[_Kind]) -> list[Deal]:
    """The files to time: layer -> type, without repeats, the second sweep after the first."""
    sizes = {kind: _bits(group.layers[0], kind) for group in kinds for kind in group.types}
    shuffle = random.Random(0)  # noqa: S311 - a design of experiment, not a secret
    orders = [shuffle.sample(group.types, len(group.types)) for group in kinds]
    uniform = [
        [wanted if wanted in group.types else min(group.types, key=lambda t: abs(sizes[t] - sizes[wanted]))
         for group in kinds]
        for wanted in sorted(sizes, key=lambda t: (sizes[t], t))
    ]  # fmt: skip
    mixed = [[order[number % len(order)] for order in orders] for number in range(len(sizes))]
    found = [
        {layer.name: chosen for group, chosen in zip(kinds, row, strict=True) for layer in group.layers}
        for row in (*uniform, *mixed)
    ]
    unquantized = dict.fromkeys(found[0], KEEP)
    return [deal for index, deal in enumerate(found) if deal != unquantized and deal not in found[:index]]


def shares(layers: Sequence[Layer], phase: str, workload: TargetSpec) -> dict[str, float]:
    """Layer -> its part of the model's multiplications in a phase. Rows that are looked up need none; a head
    computes one position for each sequence, whatever the prompt's length."""
    positions = workload.prompt_tokens if phase == PREFILL else 1
    work = {}
    for layer in layers:
        rows = {"embedding": 0, "head": 1}.get(layer.kind, positions)
        work[layer.name] = float(layer.parameters * rows)
    total = sum(work.values())
    return {name: amount / total for name, amount in work.items()}


def fit(
    kinds: Sequence[_Kind], files: Sequence[Deal], ratios: Sequence[float], share: Mapping[str, float]
) -> tuple[dict[tuple[int, str], float], float]:
    """(index of the kind, type) -> difference from the kept layer in units of T for each unit of work; and the
    root mean square of what the fit leaves of the ratios."""
    kinds_of = {layer.name: index for index, group in enumerate(kinds) for layer in group.layers}
    pairs = [(i, t) for i, group in enumerate(kinds) for t in group.types if t != KEEP]
    types = sorted({t for _, t in pairs})
    column = {key: len(types) + number for number, key in enumerate(pairs)}
    matrix = np.zeros((len(files), len(types) + len(pairs)))
    for row, deal in enumerate(files):
        for name, kind in deal.items():
            if kind != KEEP:
                matrix[row, types.index(kind)] += share[name]
                matrix[row, column[kinds_of[name], kind]] += share[name]
    observed = np.asarray(ratios) - 1
    shrink = np.eye(matrix.shape[1]) / _APART
    shrink[: len(types)] *= 1e-3  # a type may cost whatever it costs
    solved, *_ = np.linalg.lstsq(
        np.vstack([matrix / _NOISE, shrink]), np.concatenate([observed / _NOISE, np.zeros(len(shrink))]), rcond=None
    )
    left = float(np.sqrt(np.mean((matrix @ solved - observed) ** 2))) if len(files) else 0.0
    return {(i, t): float(solved[types.index(t)] + solved[column[i, t]]) for i, t in pairs}, left


@dataclass
class _Timed:
    """Phase -> one number for each file: its latency, and the unquantized model's beside it, in milliseconds."""

    own: dict[str, list[float]]
    beside: dict[str, list[float]]

    def ratios(self, phase: str) -> list[float]:
        """Each file's latency over the unquantized model's around that time."""
        beside = self.beside[phase]
        around = [beside[max(0, i - _NEIGHBOURS) : i + _NEIGHBOURS + 1] for i in range(len(beside))]
        return [own / float(np.median(near)) for own, near in zip(self.own[phase], around, strict=True)]


def _time(bench: Bench, files: Sequence[Deal], choices: Mapping[str, Mapping[str, QuantizedWeight]]) -> _Timed:
    found = _Timed({phase: [] for phase in PHASES}, {phase: [] for phase in PHASES})
    for deal in files:
        weights = {name: choices[name][kind] for name, kind in deal.items() if kind != KEEP}
        own = no_samples()
        with bench.candidate(weights) as engine:
            for number in range(_ROUNDS):
                add(own, engine.round(bench.prompt, STEPS))
                if number == 0:
                    beside = add(no_samples(), bench.unquantized.round(bench.prompt, BASE_STEPS))
        for phase in PHASES:
            found.own[phase].append(own[phase].quiet_ms)
            found.beside[phase].append(beside[phase])
    return found


def cost_table(
    model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec, bench: Bench
) -> CostTable:
    """Time files that mix the types of `choices`, and solve for what each costs on each layer, in milliseconds."""
    by_type = {name: {type_of(weight): weight for weight in weights} for name, weights in choices.items()}
    layers = [model.info.layer(name) for name in choices]
    sizes = {layer.name: sorted({KEEP, *by_type[layer.name]}, key=lambda t: (_bits(layer, t), t)) for layer in layers}
    kinds = _kinds(layers, sizes)
    kind_of = {layer.name: index for index, group in enumerate(kinds) for layer in group.layers}
    files = deals(kinds)
    timed = _time(bench, files, by_type)
    alone = {phase: [] for phase in PHASES} if files else _alone(bench)
    unquantized = {phase: float(np.median([*timed.beside[phase], *alone[phase]])) for phase in PHASES}
    base_ms, layer_ms, left = {}, {}, {}
    for phase in PHASES:
        share = shares(model.info.layers, phase, workload)
        differences, left[phase] = fit(kinds, files, timed.ratios(phase), share)
        layer_ms[phase] = {
            name: {
                text: unquantized[phase] * share[name] * (1 + differences.get((kind_of[name], kind), 0.0))
                for text, kind in ((KEEP, KEEP), *((str(w.scheme), type_of(w)) for w in weights))
            }
            for name, weights in choices.items()
        }
        base_ms[phase] = unquantized[phase] * (1 - sum(share[name] for name in choices))
    detail = {
        "threads": bench.threads,
        "files": len(files),
        "rounds": _ROUNDS,
        UNQUANTIZED: unquantized,
        "drift": {phase: _drift([*timed.beside[phase], *alone[phase]]) for phase in PHASES},
        "fit_error": left,
    }
    return CostTable(fingerprint(), base_ms, layer_ms, detail)


def _alone(bench: Bench) -> dict[str, list[float]]:
    found = add(no_samples(), bench.unquantized.round(bench.prompt, STEPS))
    return {phase: [value] for phase, value in found.items()}


def _drift(values: Sequence[float]) -> float:
    """How far the machine's own speed moved while the table was timed."""
    return max(values) / min(values) - 1
