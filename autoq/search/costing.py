"""What a study of a spec will cost: `autoq.search.cost_model`'s arithmetic on the model's real shapes.

No weights are read. Every figure is a prediction, and says what it rests on:

    computed    counts of the spec and the model's shapes alone
    measured    seconds of trials that a study of the same model, target and workers has stored
    probed      tried here, in a moment: products of matrices, distances of distributions, and each method that needs
                no statistics on a slice of a layer of random numbers
    assumed     a rate that is named

A forward pass is taken for the products of its linears, a constant for each layer and window, and what it takes to
judge its answers; attention's own products are left out, as in the cost model. Quantizing a slice takes as long per
weight as quantizing the layer.
Nothing is taken to be in the bank or the database yet.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil

from autoq import device, plugins
from autoq.errors import BadInput
from autoq.layer import Layer
from autoq.methods import Method
from autoq.models import speed
from autoq.scheme import Keep, Scheme
from autoq.search import cost_model as cost
from autoq.search.samplers import SLOPES, Sampler
from autoq.search.setup import Problem, Proposal, baselines, pose
from autoq.spec import StudySpec
from autoq.store import Store, StudyRecord

Basis = Literal["computed", "measured", "probed", "assumed"]

STARTING_SECONDS = 8.0  # imports and the model's skeleton, on two cores
LAYER_SECONDS = 8e-5  # of a layer and window beside its product: Python, norms, shares of attention
TIMING_SECONDS = 30.0  # a table of latencies, where the target times any
POINT_SECONDS = 1.5  # timing one frontier point end to end
FREE_BYTES = 700e6  # of a worker's process before it has a model: torch and transformers
ENTRY_BYTES = 700.0  # of a bank's file beside what ships
EMPTY_BYTES = 5e5  # of a database with a study and no trials
ANSWERS = 4  # tensors of a pass's logits, float32, at once
SLOPE_TOKENS = 1024  # at most, of a trial's backward pass
SLOPE_PASSES = 7.0  # what that takes, in forward passes of the same tokens
FEW_TRIALS = 4  # fewer say nothing of a trial's seconds
_SLICE = (64, 2048)  # rows and inputs of what methods are tried on, at most


@dataclass(frozen=True)
class Figure:
    """One predicted quantity in `s`, `bytes` or `trials`; `basis` is what it rests on most."""

    what: str
    value: float
    unit: str
    basis: Basis
    how: str


@dataclass(frozen=True)
class StudyCost:
    """A study's predicted costs. `against` names the study whose measurements were used, None where none were."""

    study: str
    model: str
    target: str
    workers: int
    trials: int
    against: str | None
    figures: tuple[Figure, ...]
    assumptions: tuple[str, ...]

    def __getitem__(self, what: str) -> Figure:
        return next(figure for figure in self.figures if figure.what == what)

    def to_json(self) -> dict[str, Any]:
        """`{"study", "model", "target", "workers", "trials", "kind", "against", "figures", "assumptions"}`."""
        figures = [asdict(figure) | {"kind": "predicted"} for figure in self.figures]
        return {
            **{name: getattr(self, name) for name in ("study", "model", "target", "workers", "trials")},
            "kind": "predicted",
            "against": self.against,
            "figures": figures,
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True)
class Pace:
    """Seconds of a forward pass, per token; of a trial's slopes; and the share of the tokens that trials evaluate."""

    basis: Basis
    origin: str
    token_seconds: float
    slope_seconds: float
    evaluated: float = 1.0


def predict(spec: StudySpec, store: Store | None = None, against: str | None = None) -> StudyCost:
    """The costs of a study of `spec`, by what `store` has measured: of study `against`, or else of the last that fits.

    Raises `BadInput` for a spec that does not fit, and where `against` does not fit it or has too few trials.
    """
    problem = pose(spec)
    measured = None if store is None else _measured(problem, store, against)
    pace, name = measured if measured is not None else (_pace(problem), None)
    return StudyCost(
        spec.name,
        spec.model.id,
        spec.target.name,
        spec.workers.count,
        spec.budget.trials,
        name,
        *_figures(problem, pace),
    )


# -- what is known of seconds -----------------------------------------------------------------------


def _measured(problem: Problem, store: Store, against: str | None) -> tuple[Pace, str] | None:
    """The pace of a stored study, and its name."""
    if against is not None:
        record = store.study(against)
        if (rule := _differs(problem.spec, record)) is not None:
            raise BadInput(f"--against {against}: {rule}")
        if (found := _pace_of(problem, store, record)) is None:
            raise BadInput(f"--against {against}: fewer than {FEW_TRIALS} of its trials say how long they took")
        return found, record.name
    for summary in sorted(store.studies(), key=lambda each: each.id, reverse=True):
        record = store.study(summary.id)
        if _differs(problem.spec, record) is None and (found := _pace_of(problem, store, record)) is not None:
            return found, record.name
    return None


def _differs(spec: StudySpec, record: StudyRecord) -> str | None:
    """In what a stored study is another one, as far as a trial's seconds go."""
    for section, names in (
        ("model", ("id", "dtype")),
        ("target", ("name",)),
        ("workers", ("cpus", "gpus", "executor")),
    ):
        for name in names:
            mine, other = getattr(getattr(spec, section), name), record.spec[section].get(name)
            if mine != other:
                return f"its {section}.{name} is {other!r}, and this study's is {mine!r}"
    return None


def _pace_of(problem: Problem, store: Store, record: StudyRecord) -> Pace | None:
    """By the trials of a study that went through its search tokens; None where there are too few of them."""
    rows = []
    for trial in store.trials(record.id, states=["complete", "stopped"]):
        details = [m.detail for (_, part), m in trial.measurements.items() if part == "search"]
        passes = next((float(d["forward_passes"]) for d in details if d.get("forward_passes")), 0.0)
        # Baselines make what the space does not hold, and the first of them the reference's answers too.
        if trial.seconds and passes and trial.origin in ("seed", "sampler"):
            rows.append((passes, SLOPES in trial.sampler_attrs, trial.seconds))
    plain = [seconds / passes for passes, slopes, seconds in rows if not slopes]
    if len(plain) < FEW_TRIALS:
        return None
    tokens, each = int(record.spec["data"]["search_tokens"]), statistics.median(plain)
    more = [seconds - each * passes for passes, slopes, seconds in rows if slopes]
    learned = max(0.0, statistics.median(more)) / min(tokens, SLOPE_TOKENS) if more else SLOPE_PASSES * each / tokens
    return Pace(
        "measured",
        f"{len(rows)} trials of study {record.name}",
        each / tokens,
        learned * min(problem.spec.data.search_tokens, SLOPE_TOKENS),
        statistics.fmean(min(1.0, passes) for passes, _, _ in rows) if problem.spec.budget.stop_confidence else 1.0,
    )


def _pace(problem: Problem) -> Pace:
    """By products of matrices that are tried here, or for a GPU that is not here by its data sheet."""
    spec, origin = problem.spec, "products of matrices, tried here"
    basis: Basis = "probed"
    if spec.workers.gpus > 0:
        rate, basis, origin = cost.ONE_H100.flops * min(1.0, spec.workers.gpus), "assumed", cost.ONE_H100.origin
    else:
        rate = _products(problem, spec.model.dtype)
    windows = 1 / _window_tokens(problem)
    width = problem.info.answers
    judging = 0.0 if problem.info.task == "encoder" else _answers(problem) * speed.answers(width, _threads(spec))
    each = 2 * _model(problem).active / rate + len(problem.info.layers) * LAYER_SECONDS * windows + judging
    slopes = SLOPE_PASSES * each * min(spec.data.search_tokens, SLOPE_TOKENS)
    return Pace(basis, origin, each, slopes)


def _window_tokens(problem: Problem) -> int:
    """How long a sequence of the study's data is."""
    images = problem.info.images
    return problem.spec.data.window_tokens if images is None else images.tokens


def _answers(problem: Problem) -> float:
    """Numbers of logits for a token of the data: a classifier answers once for each sequence."""
    once = problem.info.task == "classification"
    return problem.info.answers / (_window_tokens(problem) if once else 1)


def _threads(spec: StudySpec) -> int:
    """Of a worker of the study."""
    return spec.workers.cpus or max(1, device.threads() // spec.workers.count)


def _products(problem: Problem, dtype: str) -> float:
    """Operations a second of a linear of the model's middle size, with a worker's threads."""
    run = [layer for layer in problem.info.layers if layer.kind != "embedding"] or list(problem.info.layers)
    layer = sorted(run, key=lambda each: each.parameters)[len(run) // 2]
    return speed.products(layer.out_features, layer.in_features, dtype, _threads(problem.spec))


# -- what there is to do ----------------------------------------------------------------------------


def _model(problem: Problem) -> cost.Model:
    """The shapes that the cost model counts: of experts the share that a token sees, of embeddings nothing runs."""
    layers, searched = problem.info.layers, problem.space.layers.values()
    runs = sum(layer.parameters * layer.reach for layer in layers if layer.kind != "embedding")
    shapes = tuple((layer.out_features, layer.in_features) for layer in searched)
    rest = round(runs) - sum(math.prod(shape) for shape in shapes)
    stored = sum(layer.nbytes(Keep()) for layer in layers) + problem.info.other_bytes
    return cost.Model(problem.spec.model.id, shapes, rest, stored)


def _choices(problem: Problem) -> Iterator[tuple[Layer, Scheme]]:
    """Every searched layer under each choice that has to be made."""
    for variable in problem.space.variables:
        for layer, scheme in itertools.product(variable.members, variable.choices):
            if isinstance(layer, Layer) and isinstance(scheme, Scheme) and not isinstance(scheme, Keep):
                yield layer, scheme


def _made(problem: Problem, planned: Iterable[Proposal]) -> dict[tuple[Layer, Scheme], bool]:
    """What comes into the bank, and whether its loss is predicted: all choices, and what else baselines consist of."""
    found = dict.fromkeys(_choices(problem), bool(problem.qualities))
    for proposal, layer in itertools.product(planned, problem.info.layers):
        scheme = proposal.assignment[layer.name]
        if not isinstance(scheme, Keep):
            found.setdefault((layer, scheme), False)
    return found


def _quantizing(problem: Problem, made: Mapping[tuple[Layer, Scheme], bool]) -> tuple[float, bool]:
    """CPU seconds of quantizing all of it once and of judging it, and whether a rate had to be assumed."""
    software, rates, guessed, found = cost.Software(), dict[Scheme, float](), False, 0.0
    product = _products(problem, "float32")
    for (layer, scheme), judged in made.items():
        out, inputs = layer.out_features, layer.in_features
        method = plugins.load("methods", scheme.method, Method)
        if method.uses_statistics(scheme):
            guessed = True
            found += 2.0 * out * inputs**2 / software.quantize_flops
        else:
            if scheme not in rates:
                rates[scheme] = _weight_seconds(method, scheme, layer)
            found += rates[scheme] * layer.parameters
        if judged and layer.kind != "embedding":
            found += 2.0 * out * inputs**2 / product  # its predicted loss: ΔW H
    return found, guessed


def _weight_seconds(method: Method, scheme: Scheme, layer: Layer) -> float:
    """CPU seconds a weight of a method on some rows of a layer, with what makes the values of its codes."""
    rows, inputs = min(layer.out_features, _SLICE[0]), layer.in_features
    if inputs > _SLICE[1] and inputs % _SLICE[1] == 0:
        inputs = _SLICE[1]
    weight = speed.random_weight(rows, inputs)
    try:
        seconds = speed.fastest(lambda: method.quantize(weight, scheme).dequantize(), times=2)
    except BadInput:  # a scheme that fits whole layers only
        weight = speed.random_weight(layer.out_features, layer.in_features)
        seconds = speed.fastest(lambda: method.quantize(weight, scheme).dequantize(), times=1)
    return seconds / weight.numel()


def _figures(problem: Problem, pace: Pace) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    spec, software = problem.spec, cost.Software()
    model, workers, data = _model(problem), spec.workers.count, spec.data
    sampler = plugins.load("search.samplers", spec.sampler.name, Sampler)
    count, qualities = spec.budget.trials, bool(problem.qualities)
    planned = baselines(problem)
    fixed = len(planned) + len(spec.recipes)
    slopes = min(sampler.slopes, max(0, count - fixed)) if qualities else 0
    points = count if spec.budget.report_points is None else spec.budget.report_points
    points = min(count, points + fixed)
    study = cost.Study(
        model, (), count, data.search_tokens, data.calibration_tokens, data.report_tokens, points, 1 - pace.evaluated
    )  # fmt: skip
    made = _made(problem, planned)
    bank = float(sum(layer.nbytes(scheme) + ENTRY_BYTES for layer, scheme in made))
    quantizing, guessed = _quantizing(problem, made)
    each = pace.token_seconds * data.search_tokens if qualities else 0.0
    whole = each * (count * pace.evaluated + 1) + slopes * pace.slope_seconds  # one more for the reference
    deciding = count * cost.controller_seconds(study, software, spec.sampler.name)
    search = max(whole / workers, deciding) if workers > 1 else whole + deciding
    calibrating = software.calibration_passes * data.calibration_tokens * pace.token_seconds if qualities else 0.0
    reporting = (points + 1) * data.report_tokens * pace.token_seconds if qualities else 0.0
    timing = TIMING_SECONDS if problem.timed else 0.0
    reporting += POINT_SECONDS * points if problem.timed else 0.0
    loading = STARTING_SECONDS + model.stored / cost.TWO_CORES.read
    steps = (loading, calibrating, quantizing / workers, timing, search, reporting / workers)
    share = psutil.virtual_memory().available // (4 * workers) if spec.bank.memory is None else spec.bank.memory
    dequantized = float(sum(layer.dtype_bytes * layer.parameters for layer, _ in made))
    answers = 2.0 * max(data.search_tokens, data.report_tokens) * _answers(problem) if qualities else 0.0
    tokens = min(data.search_tokens, SLOPE_TOKENS if slopes else _window_tokens(problem))
    passing = ANSWERS * 4.0 * tokens * _answers(problem) if qualities else 0.0
    memory = FREE_BYTES + model.stored * (2 if slopes else 1) + min(share, dequantized) + answers + passing
    database = EMPTY_BYTES + cost.database_bytes(study, software)
    limit, backward = spec.budget.wall_time, f"the first {slopes}, with a backward pass each"
    weakest: Basis = "assumed"
    figures = [
        Figure("starting", loading, "s", "assumed", "imports, and the checkpoint's bytes / read"),
        Figure("calibration", calibrating, "s", pace.basis, f"{software.calibration_passes} passes of its tokens"),
        Figure(
            "quantizing the bank, CPU", quantizing, "s", weakest if guessed else "probed",
            f"{len(made):,} layers and schemes, baselines' too",
        ),
        Figure("the bank on disk", bank, "bytes", "computed", "every layer and scheme, as it ships"),
        Figure("timing layers", timing, "s", weakest, "the target's table of latencies" if timing else "none is timed"),
        Figure("a trial", each * pace.evaluated, "s", pace.basis, f"{pace.evaluated:.0%} of its tokens"),
        *([Figure("a trial with slopes", each + pace.slope_seconds, "s", pace.basis, backward)] if slopes else []),
        Figure("controller, a trial", deciding / count, "s", weakest, f"sampler {spec.sampler.name} and store"),
        Figure("all trials, worker time", whole, "s", pace.basis, f"{count:,} trials, and the reference's answers"),
        Figure("search", search, "s", pace.basis, f"by {workers} worker{'s' * (workers > 1)}"),
        Figure("report", reporting / workers, "s", pace.basis, f"{points:,} points at most"),
        Figure("database", database, "bytes", weakest, "rows, values of tokens"),
        Figure("memory of a worker", memory, "bytes", weakest, "process, model, answers, layers as numbers"),
        Figure("all of it", sum(steps), "s", weakest, "from the command to the report's end"),
    ]  # fmt: skip
    assumptions = [
        f"a pass takes {1e3 * pace.token_seconds:.3g} ms a token: {pace.basis}, {pace.origin}",
        f"imports take {STARTING_SECONDS:g} s, weights are read at {cost.TWO_CORES.read / 1e9:g} GB/s",
        f"all statistics take {software.calibration_passes} forward passes",
        "the machine is otherwise idle",
        "nothing is in the bank or the database yet: another study of the model has it sooner",
    ]
    if pace.basis != "measured":
        assumptions.append(f"a layer and window takes {1e6 * LAYER_SECONDS:g} µs beside its product")
        if slopes:
            assumptions.append(f"slopes take {SLOPE_PASSES:g} forward passes of {SLOPE_TOKENS:,} tokens at most")
        if spec.budget.stop_confidence is not None:
            assumptions.append("no trial is given up early; giving up saves time")
    if guessed:
        assumptions.append(f"methods with statistics do {software.quantize_flops:.2g} of gptq's operations a second")
    if timing:
        assumptions.append(f"timing layers takes {TIMING_SECONDS:g} s, a point of the report {POINT_SECONDS:g} s")
    if workers > 1:
        assumptions.append("workers share no cores, and the machine of each is like this one")
    if any(name.partition(":")[2] or "accuracy" in name for name in problem.reported):
        assumptions.append("labelled examples and generated text are not counted")
    if limit is not None:
        assumptions.append(f"budget.wall_time ends the search after {limit:g} s; that is not counted")
    return tuple(figures), tuple(assumptions)
