"""What a study needs before its first trial: validation, tables, and the fixed first proposals.

`prepare` checks a spec against the model's skeleton and the target, before any weight is loaded; what it gives back
is all that `create_study`, or a server's queue, writes. `make_plan` has the workers gather sensitivities and latency
costs and turns them into the plan: baselines, recipes and seeds. Both tables and the plan are stored, so that a resumed
study goes on with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoq import models, plugins, recipes
from autoq.assignment import Assignment
from autoq.errors import SpecError
from autoq.kv_cache import CacheScheme, KeyValue
from autoq.layer import ModelInfo
from autoq.objectives import (
    EnergyObjective,
    LatencyObjective,
    Objective,
    QualityObjective,
    TableObjective,
    TaskObjective,
)
from autoq.objectives import load as load_objective
from autoq.scheme import Keep
from autoq.search import seeds
from autoq.search.executors import Executor, Job
from autoq.search.observer import Observer
from autoq.search.prior import Additive
from autoq.search.samplers import Sampler
from autoq.search.sensitivity import gather
from autoq.search.space import SearchSpace, build_space, refusal
from autoq.search.stages import run_job
from autoq.search.tables import tabulate
from autoq.spec import StudySpec, split_objective
from autoq.store import Prepared, Store, StudyRecord
from autoq.targets import CostTable, Target, cannot_run, load_target, missing_packages
from autoq.tasks import TaskKind, source_of

MOST_SEEDS = 128  # of samplers without a model: each is an exact solution, and all of them stand in the study's plan
RESTLESS = 0.25  # drift of a machine beyond which a latency table says more of the moment than of the machine


@dataclass(frozen=True)
class Proposal:
    """A fixed first proposal: a named baseline or a seed."""

    assignment: Assignment
    baseline: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the store."""
        return {"baseline": self.baseline, "assignment": self.assignment.to_dict()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proposal:
        """The inverse of `to_json`."""
        return cls(Assignment.from_dict(data["assignment"]), data["baseline"])


@dataclass(frozen=True)
class Problem:
    """A study's fixed parts: what is searched, on what, and what is measured."""

    spec: StudySpec
    info: ModelInfo
    target: Target
    space: SearchSpace
    objectives: Mapping[str, Objective]

    @property
    def latencies(self) -> list[str]:
        """The latency objectives that the study measures."""
        return [name for name, objective in self.objectives.items() if isinstance(objective, LatencyObjective)]

    @property
    def timed(self) -> list[str]:
        """Those of them that the target can time here, and does not only predict."""
        return [] if self.target.predicts_only else self.latencies

    @property
    def energies(self) -> list[str]:
        """The energy objectives that the study measures."""
        return [name for name, objective in self.objectives.items() if isinstance(objective, EnergyObjective)]

    @property
    def qualities(self) -> list[str]:
        """The objectives that need the model to run on data."""
        return [name for name, objective in self.objectives.items() if isinstance(objective, QualityObjective)]

    @property
    def reported(self) -> list[str]:
        """Those, and what is measured in the report only."""
        return [*self.qualities, *self.spec.reported]

    @cached_property
    def sizes(self) -> dict[str, Additive]:
        """What the study measures in bytes, as sums with its bounds; the model's size where it measures nothing so."""
        counted = [n for n, o in self.objectives.items() if isinstance(o, TableObjective) and o.unit == "bytes"]
        found = {}
        for name in counted or ["size_bytes"]:
            table = tabulate(self.space, functools.partial(self.computed, name))
            assert table is not None, f"{name} is in bytes and no sum over layers"
            bound = self.spec.constraints.get(name)
            low = -math.inf if bound is None or bound.min is None else bound.min
            high = math.inf if bound is None or bound.max is None else bound.max
            found[name] = dataclasses.replace(table, low=low, high=high)
        return found

    def computed(self, name: str, assignment: Assignment) -> float:
        """The value of a `TableObjective`, whether or not the study measures it."""
        objective = load_objective(name)
        assert isinstance(objective, TableObjective), name
        return objective.compute(self.info, assignment, self.spec.target)

    @property
    def steering(self) -> list[str]:
        """What the sampler is told of: the objectives, and where no quality is among them those that are bounded.

        The smallest model within a bound on its loss lies where both are known.
        """
        names = list(self.spec.objectives)
        return names if set(names) & set(self.qualities) else [*names, *self.qualities]


def warm() -> None:
    """Import what `pose` needs, which takes seconds, so that the first spec is checked as fast as the second."""
    assert models.inspect is not None


def pose(spec: StudySpec) -> Problem:
    """Check a spec against the model's skeleton, the target and the sampler.

    Reads no weights. Raises `BadInput` with one line for whatever does not fit.
    """
    info = models.inspect(spec.model)
    target = load_target(spec.target)
    if (rule := cannot_run(target, info)) is not None:
        raise SpecError(f"target.name: {spec.target.name} cannot run {spec.model.id!r}: {rule}")
    info = dataclasses.replace(info, other_bytes=target.other_bytes(info, spec.model))
    objectives = {name: load_objective(name) for name in spec.measured}
    for name, objective in (objectives | {name: load_objective(name) for name in spec.reported}).items():
        if name in spec.reported and not isinstance(objective, QualityObjective):
            raise SpecError(f"report: {name} needs no data to be measured on; put it under objectives")
        if (rule := objective.refuses(info)) is not None:
            raise SpecError(f"objectives: {name} does not fit model {spec.model.id!r}: {rule}")
        _refuse_task(name, objective, spec)
        if isinstance(objective, TaskObjective) and spec.space.kv_cache and any(c.window for c in info.caches):
            raise SpecError(
                f"space.kv_cache: {name} generates with the runtime's own cache, and with the sliding windows of "
                f"{info.architecture} that forgets where groups of keys begin; leave one of the two out"
            )
        if isinstance(objective, LatencyObjective) and name not in target.latencies:
            can = ", ".join(sorted(target.latencies)) or "none"
            raise SpecError(f"objectives: target {spec.target.name} does not time {name}; it times {can}")
    if any(isinstance(o, LatencyObjective) for o in objectives.values()) and (missing := target.unavailable()):
        raise SpecError(f"target.name: {spec.target.name} cannot measure on this machine: {missing}")
    images = info.images
    passing = any(isinstance(o, LatencyObjective | EnergyObjective) for o in objectives.values())
    if images is not None and passing and spec.target.prompt_tokens != images.tokens:
        raise SpecError(
            f"target.prompt_tokens: an image is {images.tokens} tokens to {spec.model.id!r}, no more and no less; set "
            f"it to {images.tokens} (got {spec.target.prompt_tokens})"
        )
    space = build_space(info, spec.space, spec.target.name, target)
    held = space.caches or "peak_memory_bytes" in objectives
    if held and info.max_positions is not None and spec.target.prompt_tokens > info.max_positions:
        raise SpecError(
            f"target.prompt_tokens: {spec.target.prompt_tokens} is too long for {spec.model.id!r}, a model of "
            f"{info.max_positions} positions"
        )
    problem = Problem(spec, info, target, space, objectives)
    sampler = plugins.load("search.samplers", spec.sampler.name, Sampler)
    rule = sampler.refuses([len(v.choices) for v in space.variables], len(problem.steering), spec.sampler.options)
    if rule is not None:
        raise SpecError(f"sampler: {spec.sampler.name}: {rule}")
    _refuse_out_of_reach(problem)
    return problem


def _refuse_task(name: str, objective: Objective, spec: StudySpec) -> None:
    """Refuse a task that is not there, and one where none is needed."""
    if isinstance(objective, TaskObjective):
        source_of(name, plugins.load("tasks.kinds", objective.answers, TaskKind), spec)
        if (missing := missing_packages(objective.packages, objective.extra)) is not None:
            raise SpecError(f"objectives: {name}: {missing}")
    elif split_objective(name)[1] is not None:
        raise SpecError(f"objectives: {name}: {split_objective(name)[0]} is not measured on labelled examples")


def _refuse_out_of_reach(problem: Problem) -> None:
    """Refuse a bound on bytes that no assignment keeps: every trial would be infeasible."""
    if not any(name.endswith("_bytes") for name in problem.spec.constraints):
        return
    for name, table in problem.sizes.items():
        low, high = (table.constant + sum(map(end, table.parts.values())) for end in (np.min, np.max))
        where, space = f"constraints.{name}", "out of reach; the space reaches from"
        if table.high < low:
            raise SpecError(f"{where}.max: {table.high:.0f} bytes are {space} {low:.0f} to {high:.0f}")
        if table.low > high:
            raise SpecError(f"{where}.min: {table.low:.0f} bytes are {space} {low:.0f} to {high:.0f}")


def prepare(spec: StudySpec) -> Prepared:
    """Check a spec against model, target and data, and read what a study of it is made with. Writes nothing.

    Raises `BadInput` with one line for whatever does not fit.
    """
    problem = pose(spec)
    info = problem.info
    if problem.reported:
        from autoq.calibration.data import check

        check(spec.data, info)
    for name in problem.reported:
        objective = load_objective(name)
        if isinstance(objective, TaskObjective):
            kind = plugins.load("tasks.kinds", objective.answers, TaskKind)
            kind.read(source_of(name, kind, spec), info)
    proposals = _read_recipes(problem)
    # Readers of the store know no model: this is what a difference of two trials is priced by.
    tables: dict[str, Any] = {"layers": {layer.name: asdict(layer) for layer in problem.info.layers}}
    if problem.space.caches:
        tables["caches"] = cache_bytes(problem)
    if proposals:
        tables["recipes"] = [proposal.to_json() for proposal in proposals]
    objectives = [(name, problem.objectives[name].unit, problem.objectives[name].direction) for name in spec.objectives]
    return Prepared(objectives, tables, _facts(problem))


def _facts(problem: Problem) -> dict[str, Any]:
    variables = problem.space.variables
    counts = [len(variable.choices) for variable in variables]
    # Choices are sorted by bytes.
    smallest, largest = (problem.space.assignment(ends) for ends in ([0] * len(counts), [n - 1 for n in counts]))
    return {
        "model": problem.spec.model.id,
        "target": problem.spec.target.name,
        "layers": len(problem.info.layers),
        "searched": len(problem.space.layers),
        "variables": len(variables),
        "choices": max(counts, default=0),
        "smallest_bytes": problem.computed("size_bytes", smallest),
        "largest_bytes": problem.computed("size_bytes", largest),
    }


def create_study(store: Store, spec: StudySpec) -> StudyRecord:
    """Validate a spec and write a new study. Raises `BadInput` and then has written nothing."""
    prepared = prepare(spec)
    return store.create_study(spec, prepared.objectives, prepared.tables)


def cache_bytes(problem: Problem) -> dict[str, dict[str, int]]:
    """Searched KV cache -> scheme -> bytes of the target's whole batch, full prompts."""
    workload = problem.spec.target
    schemes: list[CacheScheme] = [Keep(), *map(KeyValue, problem.spec.space.kv_cache)]
    return {
        name: {str(scheme): workload.batch_size * cache.nbytes(scheme, workload.prompt_tokens) for scheme in schemes}
        for name, cache in problem.space.caches.items()
    }


def make_plan(
    problem: Problem,
    store: Store,
    study_id: int,
    executor: Executor,
    observer: Observer,
    facts: Mapping[str, Any],
) -> tuple[list[Proposal], CostTable | None]:
    """Baselines, recipes and seeds, and the latency table if the study needs one; all stored.

    `facts` are what a worker says of itself: its `device` is the one that is timed. Stages that a former, interrupted
    run of the study finished are read from the store.
    """
    made_elsewhere = _recipes(problem, store, study_id)
    costs = _costs(problem, store, study_id, executor, observer, made_elsewhere, facts)
    stored = store.study(study_id).plan
    if stored:
        return [Proposal.from_json(entry) for entry in stored["proposals"]], costs
    plan = [*baselines(problem), *made_elsewhere]
    sampler = plugins.load("search.samplers", problem.spec.sampler.name, Sampler)
    wanted = problem.spec.sampler.seeds
    if wanted is None:
        wanted = min(max(0, problem.spec.budget.trials - len(plan)) // 2, MOST_SEEDS)
        # The other half of its slopes is better measured where the first half leads.
        wanted = min(wanted, sampler.slopes // 2) if sampler.slopes else wanted
    sensitivities = None
    if problem.qualities and (wanted or sampler.uses_losses):
        sensitivities = _sensitivities(problem, store, study_id, executor, observer)
    if wanted and sensitivities is not None:
        sizes = list(problem.sizes.values())
        found = seeds.proposals(problem.space, sensitivities, sizes, costs, problem.latencies, wanted)
        plan += [Proposal(problem.space.assignment(indices)) for indices in found]
    first: dict[str, Proposal] = {}
    for proposal in plan:
        same = first.setdefault(proposal.assignment.hash, proposal)
        # Whoever gave a recipe will look for it.
        if proposal.baseline and same is not proposal:
            observer.note(f"{proposal.baseline} is the same assignment as {same.baseline}")
    unique = list(first.values())
    store.save_plan(study_id, {"proposals": [proposal.to_json() for proposal in unique]})
    return unique, costs


def baselines(problem: Problem) -> list[Proposal]:
    """What people would do without a search: uniform assignments, uniform KV caches, the runtime's own mixes."""
    refuses = refusal(problem.spec.target.name, problem.target)
    found: dict[str, Proposal] = {}
    for name, preference in problem.target.baselines().items():
        assignment = problem.space.uniform(preference, refuses)
        # A baseline that nothing can run is the unquantized model again: its first name stays.
        found.setdefault(assignment.hash, Proposal(assignment, name))
    for bits in problem.spec.space.kv_cache:
        assignment = problem.space.cached(KeyValue(bits))
        found.setdefault(assignment.hash, Proposal(assignment, f"uniform-kv{bits}"))
    for name, schemes in problem.target.presets(problem.info).items():
        assignment = problem.space.assignment_of(schemes)
        found.setdefault(assignment.hash, Proposal(assignment, name))
    return list(found.values())


def _read_recipes(problem: Problem) -> list[Proposal]:
    """The spec's recipes as baselines, each of its own name. Raises `RecipeRefused`."""
    found: dict[str, Proposal] = {}
    for path in problem.spec.recipes:
        recipe = recipes.read(path, problem.info, problem.target)
        names = (f"recipe:{recipe.name}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
        name = next(name for name in names if name not in found)
        found[name] = Proposal(recipe.assignment, name)
    return list(found.values())


def _recipes(problem: Problem, store: Store, study_id: int) -> list[Proposal]:
    """The recipes as they were when the study was created: their files may be gone or changed by now."""
    if not problem.spec.recipes:
        return []
    if (stored := store.table(study_id, "recipes")) is not None:
        return [Proposal.from_json(entry) for entry in stored]
    # An older version wrote them after the study, and its process ended in between.
    proposals = _read_recipes(problem)
    store.put_table(study_id, "recipes", [proposal.to_json() for proposal in proposals])
    return proposals


def _sensitivities(
    problem: Problem, store: Store, study_id: int, executor: Executor, observer: Observer
) -> dict[str, dict[str, float]]:
    stored: dict[str, dict[str, float]] = store.table(study_id, "sensitivity") or {}
    choices = {name: [str(s) for s in schemes] for name, schemes in problem.space.choices.items()}
    if all(text in stored.get(name, {}) for name, texts in choices.items() for text in texts):
        return stored
    table = gather(choices, problem.spec.target.name, store, executor, observer)
    store.put_table(study_id, "sensitivity", table)
    return table


def _costs(
    problem: Problem,
    store: Store,
    study_id: int,
    executor: Executor,
    observer: Observer,
    made_elsewhere: Sequence[Proposal],
    facts: Mapping[str, Any],
) -> CostTable | None:
    if not problem.latencies:
        return None
    device = f"{facts['device']}, {facts['threads']} threads"
    if (stored := store.table(study_id, "costs")) is not None:
        return CostTable(**stored)
    choices = _timed_choices(problem, made_elsewhere)
    table: CostTable
    if problem.target.predicts_only:
        table = problem.target.predicted_costs(problem.info, choices, problem.spec.target)
    elif (shared := _shared_costs(problem, store, choices, device)) is not None:
        table = shared
    else:
        observer.stage("time", 1)
        job = Job("costs", "cost_table", {"choices": choices}, exclusive=True, device=facts["device"])
        table = run_job(executor, job).value
        if table.restlessness > RESTLESS:
            observer.note(
                f"the machine's speed moved by {table.restlessness:.0%} while latencies were timed: predictions are "
                "worth no more than that, and no later study takes them over"
            )
        else:
            store.put_costs(_costs_key(problem, device), device, asdict(table))
        store.put_table(study_id, "costs", asdict(table))
        observer.advance()  # after it is stored: whoever hears of it may end the study here
        return table
    store.put_table(study_id, "costs", asdict(table))
    return table


def _costs_key(problem: Problem, device: str) -> str:
    """What a latency table depends on beside the choices that it covers."""
    layers = [asdict(layer) for layer in problem.info.layers]
    workload = problem.spec.target.model_dump()
    told = [device, problem.target.runtime(), problem.info.architecture, problem.info.dtype, workload, layers]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _shared_costs(
    problem: Problem, store: Store, choices: Mapping[str, Sequence[str]], device: str
) -> CostTable | None:
    """The table that an earlier study timed on this device, if it covers all choices."""
    stored = store.costs(_costs_key(problem, device))
    table = None if stored is None else CostTable(**stored)
    return table if table is not None and table.covers(choices, problem.latencies) else None


def _timed_choices(problem: Problem, made_elsewhere: Sequence[Proposal]) -> dict[str, list[str]]:
    """Layer -> the schemes that the study may need the latency of."""
    refuses = refusal(problem.spec.target.name, problem.target)
    choices = {}
    baselines = [problem.space.uniform(list(p), refuses) for p in problem.target.baselines().values()]
    presets = list(problem.target.presets(problem.info).values())
    for layer in problem.info.layers:
        searched = problem.space.choices.get(layer.name)
        # A baseline may use schemes that the study does not search, and any layer may be kept.
        more = ["keep", *(str(baseline[layer.name]) for baseline in baselines)] if searched else ["keep"]
        more += [str(schemes[layer.name]) for schemes in presets if searched]
        more += [str(proposal.assignment[layer.name]) for proposal in made_elsewhere]
        choices[layer.name] = list(dict.fromkeys([*(str(s) for s in searched or ()), *more]))
    return choices
