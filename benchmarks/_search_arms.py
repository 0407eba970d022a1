"""The arms of `search.py`: each spends its cost as it likes and answers with one assignment per size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from _search_yardstick import Choices, Meter, Table

from autoq import plugins
from autoq.search.optuna_study import AskTell, Row
from autoq.search.samplers import SLOPES, Sampler, Value

MAX_REPEATS = 200  # proposals in a row that were known, after which a sampler has nothing new


@dataclass(frozen=True)
class Trial:
    """One measured assignment: KL on the search's windows and bytes of the searched layers."""

    choices: Choices
    kl: float
    bytes: float


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    `cost` is the most that it may spend, in passes, on all of it; `calibration` the tokens that its predicted losses
    come from, 0 for none, and `own` whether these are AutoQ's or the usual ones; a trial runs on `windows` of the
    search part. `seeded` arms begin with exact solutions of the predicted losses, at the sizes and between them. The
    first `slopes` trials measure slopes (None: as many as the sampler wants). A search that has taken `seconds` of
    CPU time, which other work does not lengthen, begins no more trials.
    """

    name: str
    sampler: str
    run: Callable[[Arm, Meter, Sequence[float]], list[Choices]]
    cost: float = math.inf
    calibration: int = 4096
    own: bool = False
    windows: int = 1
    seeded: bool = True
    slopes: int | None = None
    options: Mapping[str, Value] = field(default_factory=dict)
    seconds: float = math.inf


def uniform(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """The same choice everywhere, the largest that fits."""
    yard = meter.yardstick
    levels = yard.levels()
    fitting = [[level for level in levels if yard.total(level) <= budget] for budget in budgets]
    return [max(fits or levels[:1], key=yard.total) for fits in fitting]


def predicted(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """Exact solutions of the predicted losses, nothing measured."""
    return meter.yardstick.solve(meter.losses(arm.calibration, arm.own), budgets)


def probed(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """Every layer measured alone, then what the sampler makes of it under a bound at each size."""
    yard = meter.yardstick
    reference = tuple(n - 1 for _, n in yard.parameters)
    # HIGGS scales a probe to other choices by the errors of the weights.
    losses = yard.squared_errors()
    probe = int(arm.options.get("probe") or 0)
    design = [reference]
    design += [(*reference[:i], min(probe, n - 2), *reference[i + 1 :]) for i, (_, n) in enumerate(yard.parameters)]
    rows = [Row(i, choices, "complete", [meter.kl(choices, arm.windows)]) for i, choices in enumerate(design)]
    found = []
    for budget in budgets:
        prior = yard.prior(losses, limit=budget)
        study = AskTell(yard.parameters, ["minimize"], arm.sampler, meter.seed, arm.options, prior=prior)
        study.restore(rows, {})
        found.append(tuple(study.ask(len(rows)) or reference))
    return found


def measured(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """One study of (KL, size) for all sizes."""
    losses = meter.losses(arm.calibration, arm.own) if arm.calibration else None
    trials = search(arm, meter, arm.cost, losses, first=_seeds(arm, meter, losses, budgets))
    return final(trials, budgets)


def split(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """A study of KL alone for each size, bounded by it; they share the cost evenly."""
    losses = meter.losses(arm.calibration, arm.own) if arm.calibration else None
    share = (arm.cost - meter.cost) / len(budgets)
    trials: list[Trial] = []
    for i, budget in enumerate(budgets):
        first = meter.yardstick.solve(losses, [budget]) if arm.seeded and losses is not None else []
        until = arm.cost - share * (len(budgets) - 1 - i)
        trials += search(arm, meter, until, losses, first, limit=budget)
    return final(trials, budgets)


def modelled(arm: Arm, meter: Meter, budgets: Sequence[float]) -> list[Choices]:
    """One study that proposes at exactly the sizes in turns, from large to small; then what its model says of them.

    Predictions are most reliable where much is kept, so whole rounds come last and the smallest get what is over.
    Every trial measures slopes, on the windows after the last trial's.
    """
    yard = meter.yardstick
    losses = meter.losses(arm.calibration, arm.own)
    count = int((arm.cost - meter.cost) // (3 * arm.windows))
    turns = sorted(budgets, reverse=True)
    turns = turns[-count % len(turns) :] + turns[: -count % len(turns)]
    options = {"budgets": ",".join(f"{math.floor(budget)}" for budget in turns), **arm.options}
    study = AskTell(yard.parameters, ["minimize"] * 2, arm.sampler, meter.seed, options, prior=yard.prior(losses))
    for number in range(count):
        choices = tuple(study.ask(number) or ())
        kl, table = meter.slopes(choices, arm.windows, arm.windows * number)
        study.learn(number, {SLOPES: {"loss": kl, "table": table}})
        study.tell(number, [kl, yard.total(choices)])
    return [tuple(choices) for choices in study.solutions(budgets)]


def _seeds(arm: Arm, meter: Meter, losses: Table | None, budgets: Sequence[float]) -> list[Choices]:
    if not arm.seeded or losses is None:
        return []
    between = [(a + b) / 2 for a, b in pairwise(budgets)]
    return list(dict.fromkeys(meter.yardstick.solve(losses, [*budgets, *between])))


def final(trials: Sequence[Trial], budgets: Sequence[float]) -> list[Choices]:
    """The answer of an arm that measured: at each size the trial of least KL that fits it."""
    found = []
    for budget in budgets:
        fitting = [trial for trial in trials if trial.bytes <= budget]
        if fitting:
            found.append(min(fitting, key=lambda trial: trial.kl).choices)
        else:  # an arm that found nothing small enough answers with the nearest
            found.append(min(trials, key=lambda trial: trial.bytes).choices)
    return found


def search(
    arm: Arm,
    meter: Meter,
    until: float,
    losses: Table | None,
    first: Sequence[Choices],
    limit: float | None = None,
    options: Mapping[str, Value] | None = None,
) -> list[Trial]:
    """Ask, measure and tell until the next trial would cost more than `until`. A repeat costs nothing.

    With a `limit` in bytes KL is the only objective and the size a constraint.
    """
    yard = meter.yardstick
    study = AskTell(
        yard.parameters,
        ["minimize"] if limit is not None else ["minimize", "minimize"],
        arm.sampler,
        meter.seed,
        {**(options or {}), **arm.options},
        n_constraints=int(limit is not None),
        n_startup=len(first),
        prior=yard.prior(losses, limit),
    )
    sloped = arm.slopes
    if sloped is None:
        sloped = getattr(plugins.load("search.samplers", arm.sampler, Sampler), "slopes", 0)
    known: dict[Choices, Trial] = {}
    number = repeats = 0
    deadline = time.process_time() + arm.seconds
    while repeats < MAX_REPEATS and time.process_time() < deadline:
        wants_slopes = len(known) < sloped
        if meter.cost + arm.windows * (3 if wants_slopes else 1) > until:
            break
        if number < len(first):
            choices = tuple(first[number])
            study.ask_fixed(number, choices)
        else:
            proposal = study.ask(number)
            if proposal is None:
                break
            choices = tuple(proposal)
        repeats = repeats + 1 if choices in known else 0
        if not repeats:
            if wants_slopes:
                kl, table = meter.slopes(choices, arm.windows)
                study.learn(number, {SLOPES: {"loss": kl, "table": table}})
            else:
                kl = meter.kl(choices, arm.windows)
            known[choices] = Trial(choices, kl, yard.total(choices))
        trial = known[choices]
        if limit is None:
            study.tell(number, [trial.kl, trial.bytes])
        else:
            study.tell(number, [trial.kl], [trial.bytes / limit - 1.0])
        number += 1
    return list(known.values())
