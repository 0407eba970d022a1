"""The default sampler: as any Optuna study may use it, and in a study of ours."""

import dataclasses
import itertools
import math

import numpy as np
import optuna
import pytest

from autoq.errors import BadInput
from autoq.search.optuna_study import AskTell, Row
from autoq.search.prior import Additive, Prior
from autoq.search.samplers import frontier
from autoq.search.samplers._known import nondominated
from autoq.search.samplers._trials import fitted, positive
from autoq.search.samplers.frontier import PREDICTED, FrontierSampler, _step


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Toy:
    """Layers whose losses fall fourfold with each choice, interact mildly, and are predicted roughly."""

    def __init__(self, layers=4, width=6, seed=0, wrong=0.4):
        rng = np.random.default_rng(seed)
        self.names = [f"blocks.{i // 2}.{'in' if i % 2 else 'out'}" for i in range(layers)]
        bits = 2.0 + np.arange(width)
        self.own = rng.lognormal(0, 1, (layers, 1)) * 4.0**-bits * rng.uniform(0.8, 1.25, (layers, width))
        pairs = np.triu(rng.uniform(-0.3, 0.6, (layers, layers)), 1) / math.sqrt(layers)
        self.pairs = pairs + pairs.T
        self.size = rng.integers(1, 6, (layers, 1)) * bits
        self.energy = rng.uniform(1, 2, (layers, 1)) * rng.uniform(0.5, 1.5, (layers, width))
        self.predicted = self.own * rng.lognormal(0, wrong, (layers, 1))

    def table(self, matrix):
        return dict(zip(self.names, matrix, strict=True))

    def prior(self, **bounds):
        return Prior(self.table(self.predicted), {1: Additive(0.0, self.table(self.size), **bounds)})

    def loss(self, choices):
        root = np.sqrt(self.own[np.arange(len(self.own)), choices])
        return float(root @ root + 0.5 * root @ self.pairs @ root)

    def total(self, matrix, choices):
        return float(matrix[np.arange(len(matrix)), choices].sum())

    def study(self, seed=0, prior=None, directions=("minimize", "minimize"), **changes):
        parameters = [(name, self.own.shape[1]) for name in self.names]
        return AskTell(parameters, directions, "frontier", seed, prior=prior or self.prior(), **changes)

    def play(self, study, count, first=0):
        asked = []
        for number in range(first, first + count):
            asked.append(study.ask(number))
            study.tell(number, [self.loss(asked[-1]), self.total(self.size, asked[-1])])
        return asked

    def frontier(self):
        every = list(itertools.product(range(self.own.shape[1]), repeat=len(self.own)))
        values = np.array([[self.loss(c), self.total(self.size, c)] for c in every])
        return {every[i] for i in np.flatnonzero(nondominated(values))}


@pytest.mark.parametrize("bound", ["high", "low"])
def test_a_bound_on_what_is_learned_is_kept_as_far_as_it_is_known(bound):
    """Few proposals break it, and those that keep it are spread along the frontier all the same."""
    toy = Toy(layers=12, seed=3)
    ends = [toy.loss([choice] * 12) for choice in (1, 3)]
    limit = math.sqrt(ends[0] * ends[1])
    kept = (-math.inf, limit) if bound == "high" else (limit, math.inf)
    prior = Prior(toy.table(toy.predicted), toy.prior().additive, learned={0: kept})
    study, broken, sizes = toy.study(prior=prior, n_constraints=1), 0, []
    for number in range(30):
        choices = study.ask(number)
        loss, size = toy.loss(choices), toy.total(toy.size, choices)
        excess = loss / limit - 1 if bound == "high" else 1 - loss / limit
        study.tell(number, [loss, size], [excess])
        broken += excess > 0 and number >= 5
        sizes += [size] if excess <= 0 else []
    assert broken <= 6
    assert len(set(sizes)) > 8


def test_a_range_that_is_no_choice_is_left_to_chance():
    def objective(trial):
        bits = trial.suggest_int("bits", 2, 8)
        return (bits - 5) ** 2 + 1e-12 * trial.suggest_int("steps", 0, 10**9)

    study = optuna.create_study(sampler=FrontierSampler(seed=0))
    study.optimize(objective, n_trials=15)
    assert study.best_params["bits"] == 5
    assert len({trial.params["steps"] for trial in study.trials}) == 15


# -- in plain Optuna ------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [["minimize"], ["maximize"], ["minimize", "maximize"]])
def test_it_serves_any_study_of_integers_and_categories(directions):
    """No prior, callbacks, steps, categories that are texts, and a float that is none of its business."""
    seen = []

    def objective(trial):
        loss = sum(4.0 ** -trial.suggest_int(f"layer{i}", 2, 8, step=2) for i in range(5))
        loss += {"a": 0.1, "b": 0.03, "c": 0.01}[trial.suggest_categorical("scheme", ["a", "b", "c"])]
        assert 0 <= trial.suggest_float("other", 0, 1) <= 1
        return [loss if direction == "minimize" else -loss for direction in directions]

    study = optuna.create_study(directions=directions, sampler=FrontierSampler(seed=3))
    study.optimize(objective, n_trials=24, callbacks=[lambda _, trial: seen.append(trial.number)])
    assert seen == list(range(24))
    best = study.best_trials[0]
    assert best.params["scheme"] == "c"
    assert sum(best.params[f"layer{i}"] for i in range(5)) >= 36
    asked = [tuple(v for k, v in sorted(t.params.items()) if k != "other") for t in study.trials]
    assert len(set(asked)) == 24


def test_the_first_trial_of_a_plain_study_draws_each_parameter_by_itself():
    study = optuna.create_study(sampler=FrontierSampler(seed=0))
    trial = study.ask()
    assert len({trial.suggest_int(f"p{i}", 0, 999) for i in range(20)}) > 15


def test_predictions_are_in_the_unit_of_the_objective():
    """Accuracies of which more is better are negative losses to a model; nobody else need know."""
    study = optuna.create_study(direction="maximize", sampler=FrontierSampler(seed=0))
    study.optimize(lambda t: 0.9 - sum(4.0 ** -t.suggest_int(f"layer{i}", 1, 5) for i in range(4)), n_trials=30)
    told = [(t.system_attrs[PREDICTED], t.value) for t in study.trials if PREDICTED in t.system_attrs]
    assert len(told) >= 28
    late = np.array(told[-12:])
    assert np.median(np.abs(late[:, 0] - late[:, 1])) < 0.01


def test_threads_propose_without_harm():
    study = optuna.create_study(sampler=FrontierSampler(seed=0))
    study.optimize(lambda t: sum(2.0 ** -t.suggest_int(f"p{i}", 0, 5) for i in range(8)), n_trials=24, n_jobs=4)
    assert [t.number for t in study.trials if t.value is not None] == list(range(24))


# -- proposals ------------------------------------------------------------------------------------


def test_those_that_are_pending_are_all_different():
    toy = Toy(10)
    study = toy.study()
    toy.play(study, 8)
    asked = [study.ask(number) for number in range(8, 14)]
    assert len(set(map(tuple, asked))) == 6
    sizes = sorted(toy.total(toy.size, choices) for choices in asked)
    low, high = toy.size.min(1).sum(), toy.size.max(1).sum()
    assert sizes[-1] - sizes[0] > 0.15 * (high - low)


@pytest.mark.parametrize("layers", [4, 12])
def test_a_study_that_was_resumed_proposes_what_it_would_have(layers):
    """The memory of trials between proposals is no part of the result, nor is the order in which they end."""
    toy = Toy(layers)
    whole = toy.study(seed=5)
    asked = toy.play(whole, 12)
    assert toy.play(toy.study(seed=5), 12) == asked
    rows = [
        Row(n, c, "complete", [toy.loss(c), toy.total(toy.size, c)], attrs=whole.attrs(n))
        for n, c in enumerate(asked[:9])
    ]
    again = toy.study(seed=5)
    again.restore(rows, {})
    assert toy.play(again, 3, first=9) == asked[9:]
    if layers > 4:
        assert toy.play(toy.study(seed=6), 12) != asked


def test_the_order_in_which_trials_end_does_not_count():
    toy = Toy(12)
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        study = toy.study()
        asked = [study.ask(number) for number in range(4)]
        for number in order:
            study.tell(number, [toy.loss(asked[number]), toy.total(toy.size, asked[number])])
        results.append([*asked, study.ask(4)])
    assert results[0] == results[1]


def test_each_proposal_says_what_it_predicts():
    toy = Toy(12)
    study = toy.study()
    asked = toy.play(study, 30)
    predicted = [study.attrs(number)[PREDICTED] for number in range(30)]
    ratios = np.log([toy.loss(c) / p for c, p in zip(asked, predicted, strict=True)])
    assert np.abs(ratios[15:]).mean() < 0.15


def test_with_nothing_to_start_from_proposals_spread_over_all_sizes():
    """They do not crawl along the frontier from where they began."""
    toy = Toy(40)
    sizes = np.array([toy.total(toy.size, c) for c in toy.play(toy.study(), 12)])
    low, high = toy.size.min(1).sum(), toy.size.max(1).sum()
    hit = np.histogram(sizes, bins=4, range=(low, high))[0]
    assert (hit > 0).all()


def shortfall(toy, asked):
    """Mean log of the least loss within several sizes."""
    sizes = np.array([toy.total(toy.size, c) for c in asked])
    losses = np.log([toy.loss(c) for c in asked])
    low, high = toy.size.min(1).sum(), toy.size.max(1).sum()
    ceiling = math.log(toy.loss([0] * len(toy.own)))
    budgets = low + (high - low) * np.linspace(0.1, 0.9, 9)
    return np.mean([losses[sizes <= b].min(initial=ceiling) for b in budgets])


def test_trials_mend_what_was_predicted_wrong():
    """One kind of layer counts for eight times as much as predicted; against exact solutions of the prediction."""
    toy = Toy(20, seed=1, wrong=0.1)
    toy.predicted[::2] /= 8
    fixed = AskTell([(n, 6) for n in toy.names], ["minimize"] * 2, "gradient_ilp", 0, prior=toy.prior())
    assert shortfall(toy, toy.play(toy.study(), 24)) < shortfall(toy, toy.play(fixed, 24)) - 0.08


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_of_a_small_space_is_found_in_a_tenth_of_it(seed):
    toy = Toy(4, seed=seed)
    missing, study = toy.frontier(), toy.study(seed=seed)
    for number in range(6**4 // 10):
        missing -= set(map(tuple, toy.play(study, 1, first=number)))
        if not missing:
            break
    assert not missing


def test_three_objectives():
    """Loss, size and energy, of which two are tables: most of the frontier in a tenth of the space."""
    toy = Toy(4, 5)
    tables = {1: Additive(0.0, toy.table(toy.size)), 2: Additive(0.0, toy.table(toy.energy))}
    study = toy.study(prior=Prior(toy.table(toy.predicted), tables), directions=["minimize"] * 3)

    def values(c):
        return [toy.loss(c), toy.total(toy.size, c), toy.total(toy.energy, c)]

    every = np.array([values(c) for c in itertools.product(range(5), repeat=4)])
    asked = []
    for number in range(63):
        asked.append(values(study.ask(number)))
        study.tell(number, asked[-1])
    front = every[nondominated(every)]
    found = {tuple(row) for row in asked}
    share = np.mean([tuple(row) in found for row in front])
    precise = np.mean([tuple(row) in set(map(tuple, front)) for row in asked])
    assert precise > 2 * len(front) / len(every)
    assert share > 0.4 if len(front) < 100 else share > 0.8 * 63 / len(front)


def test_two_learned_objectives_and_none_that_is_a_table():
    parameters = [(f"p{i}", 4) for i in range(12)]
    study = AskTell(parameters, ["minimize", "maximize"], "frontier", 0)
    for number in range(20):
        c = study.ask(number)
        study.tell(number, [sum(4.0**-i for i in c), -float(sum(c[:6])) + 0.01 * c[-1]])
        assert study.attrs(number)[PREDICTED] is None


@pytest.mark.parametrize("layers", [4, 12])
def test_bounds_on_known_sums_are_kept(layers):
    """One on an objective, one on a sum that is none, which pulls another way."""
    toy = Toy(layers, seed=9)
    low, high = toy.size.min(1).sum(), toy.size.max(1).sum()
    limit, spent = 0.6 * high + 0.4 * low, 0.35 * toy.energy.max(1).sum() + 0.65 * toy.energy.min(1).sum()
    tables = toy.prior(high=limit).additive
    prior = Prior(toy.table(toy.predicted), tables, [Additive(0.0, toy.table(toy.energy), high=spent)])
    study = toy.study(prior=prior, n_constraints=2)
    asked = set()
    for number in range(30):
        c = study.ask(number)
        asked.add(tuple(c))
        size, energy = toy.total(toy.size, c), toy.total(toy.energy, c)
        assert size <= limit * (1 + 1e-9)
        assert energy <= spent * (1 + 1e-9)
        study.tell(number, [toy.loss(c), size], [size - limit, energy - spent])
    assert len(asked) == 30


def test_budgets_that_were_asked_for_are_kept_in_turns():
    toy = Toy(12)
    low, high = toy.size.min(1).sum(), toy.size.max(1).sum()
    budgets = [float(low + share * (high - low)) for share in (0.3, 0.6)]
    study = toy.study(options={"budgets": ",".join(map(str, budgets))})
    sizes = [toy.total(toy.size, c) for c in toy.play(study, 12)]
    for number, size in enumerate(sizes):
        assert 0.8 * budgets[number % 2] < size <= budgets[number % 2]


def test_budgets_that_are_no_numbers_are_refused():
    with pytest.raises(BadInput, match=r"option 'budgets' must be finite numbers, separated by commas \(got '90MB'\)"):
        Toy().study(options={"budgets": "90MB"})


@pytest.mark.parametrize("value", [math.inf, 0.0, 1e9])
def test_a_broken_trial_leaves_proposals_sane(value):
    toy = Toy(12)
    study = toy.study()
    asked = []
    for number in range(30):
        asked.append(study.ask(number))
        loss = value if number == 4 else toy.loss(asked[-1])
        study.tell(number, [loss, toy.total(toy.size, asked[-1])])
    assert len(set(map(tuple, asked))) == 30
    clean = shortfall(toy, toy.play(toy.study(), 30))
    assert shortfall(toy, asked[:4] + asked[5:]) < clean + 0.15


def test_failed_trials_are_not_proposed_again():
    toy = Toy(3, 3)
    study = toy.study()
    asked = []
    for number in range(27):
        asked.append(tuple(study.ask(number)))
        study.tell(number, None if number % 2 else [toy.loss(asked[-1]), toy.total(toy.size, asked[-1])])
    assert len(set(asked)) == 27
    assert study.ask(27) is None


# -- positive -------------------------------------------------------------------------------------


def test_losses_become_positive_and_come_back():
    values = np.array([0.3, np.inf, 0.7])
    assert positive(values)[0].tolist() == [0.3, 1.4, 0.7]
    # A distance of zero, but for rounding, moves no other loss.
    losses, shift = positive(np.array([-1e-9, 0.002, 0.5, 4.0]))
    assert (losses.tolist(), shift) == ([0.001, 0.002, 0.5, 4.0], 0.0)
    # Of negative ones the least is a little above zero, however bad the worst.
    for worst in (-0.1, 1e6):
        values = np.array([-0.8, -0.7, -0.6, worst])
        losses, shift = positive(values)
        assert losses + shift == pytest.approx(values)
        assert 0 < losses[0] < 0.2 * losses[1]
    assert positive(np.full(3, np.inf))[0].tolist() == [1, 1, 1]
    assert positive(np.zeros(3))[0].tolist() == pytest.approx([0.05] * 3)


def test_with_many_out_proposals_share_a_model_and_are_the_same_after_a_break(monkeypatch):
    """130 out: the model hears of two at once. A study that is brought back in between goes on as this one does."""
    assert [_step(pending) for pending in (0, 15, 127, 128, 255, 256, 4321)] == [1, 1, 1, 2, 2, 4, 64]
    toy, fits, asked, rows = Toy(layers=12, seed=5), [], [], []
    monkeypatch.setattr(frontier, "fitted", lambda *told: fits.append(len(told[0])) or fitted(*told))
    study = toy.study()
    for number in range(160):
        asked.append(study.ask(number))
        if number >= 129:
            told = number - 129
            study.tell(told, [toy.loss(asked[told]), toy.total(toy.size, asked[told])])
        if number == 148:
            rows = [Row(n, asked[n], "running" if n > 19 else "complete", attrs=study.attrs(n)) for n in range(149)]
    assert len({tuple(choices) for choices in asked}) == 160
    # None until one was told with 128 others out; then every other one.
    assert fits == [0, *range(2, 31, 2)]
    values = [[toy.loss(asked[n]), toy.total(toy.size, asked[n])] for n in range(20)]
    again = toy.study()
    again.restore([dataclasses.replace(row, values=values[n] if n < 20 else None) for n, row in enumerate(rows)], {})
    for number in range(149, 160):
        assert again.ask(number) == asked[number]
        told = number - 129
        again.tell(told, [toy.loss(asked[told]), toy.total(toy.size, asked[told])])
