"""One claim of each sampler that is another project's idea: budgets are kept, and what is known is used."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.search.optuna_study import AskTell
from autoq.search.prior import Additive, Prior
from autoq.search.samplers import actor_critic
from autoq.search.samplers._known import Known, Table, nondominated
from autoq.search.samplers.actor_critic import lower_to_fit
from autoq.search.samplers.evolution import switch_levels

ALTERNATIVES = ["actor_critic", "evolution", "gradient_ilp", "predictor", "probe_ilp"]


class Toy:
    """A loss that is exactly a sum over layers, their sizes, and a prediction that is wrong by a factor for each."""

    def __init__(self, n_layers, n_choices, seed, wrong=0.0):
        rng = np.random.default_rng(seed)
        self.names = [f"blocks.{i // 2}.{'in' if i % 2 else 'out'}" for i in range(n_layers)]
        bits = np.arange(2, 2 + n_choices)
        self.size = {name: float(rng.integers(3, 9)) * bits for name in self.names}
        sharp = [np.exp(rng.normal(2.0 * (i % 2), 0.5)) for i in range(n_layers)]
        self.true = {
            name: s * 4.0**-bits * rng.uniform(0.8, 1.2, n_choices) for name, s in zip(self.names, sharp, strict=True)
        }
        self.predicted = {name: t * np.exp(rng.normal(0.0, wrong)) for name, t in self.true.items()}
        self.prior = Prior(self.predicted, {1: Additive(100.0, self.size)})

    def total(self, table, indices):
        return float(sum(table[name][i] for name, i in zip(self.names, indices, strict=True)))

    def study(self, sampler, seed=0, prior=None, directions=("minimize", "minimize"), **changes):
        parameters = [(name, len(self.size[name])) for name in self.names]
        return AskTell(parameters, directions, sampler, seed, prior=prior or self.prior, **changes)

    def play(self, study, n):
        proposals = []
        for number in range(n):
            proposals.append(study.ask(number))
            study.tell(number, [self.total(self.true, proposals[-1]), 100.0 + self.total(self.size, proposals[-1])])
        return proposals

    def least(self, losses, limit):
        """The least loss of all assignments that are no larger, by trying all of them."""
        every = itertools.product(*(range(len(self.size[name])) for name in self.names))
        fitting = (c for c in every if self.total(self.size, c) <= limit)
        return min(self.total(losses, c) for c in fitting)


def test_gradient_ilp_proposes_what_trying_all_assignments_finds_best_by_the_prediction():
    toy = Toy(4, 4, 0, wrong=1.0)
    for proposal in toy.play(toy.study("gradient_ilp"), 8):
        best = toy.least(toy.predicted, toy.total(toy.size, proposal))
        assert toy.total(toy.predicted, proposal) == pytest.approx(best, rel=1e-9)


def test_gradient_ilp_starts_at_both_ends_and_then_spreads_from_coarse_to_fine():
    toy = Toy(30, 5, 1)
    sizes = np.array([toy.total(toy.size, p) for p in toy.play(toy.study("gradient_ilp"), 18)])
    low, high = (sum(float(end(v)) for v in toy.size.values()) for end in (min, max))
    assert (sizes[0], sizes[1]) == (low, high)
    assert np.bincount(((sizes[2:] - low) / (high - low) * 8).astype(int), minlength=8).tolist() == [2] * 8


def test_gradient_ilp_takes_turns_between_tables_and_knows_their_directions():
    toy = Toy(12, 5, 2)
    rng = np.random.default_rng(0)
    latency = {name: rng.uniform(1, 2) * np.array([1.0, 1.4, 1.2, 1.9, 2.0]) for name in toy.names}
    both = Prior(toy.predicted, {1: Additive(0.0, toy.size), 2: Additive(0.0, {n: -v for n, v in latency.items()})})
    study = toy.study("gradient_ilp", prior=both, directions=("minimize", "minimize", "maximize"))
    proposals = [study.ask(number) for number in range(8)]
    assert proposals[0] == [0] * 12
    # The third choice is faster than the second and loses less.
    assert 1 not in {i for p in proposals[1::2] for i in p}
    assert 1 in {i for p in proposals[0::2][2:] for i in p}


def random_known(rng, n=20, k=5):
    weights = np.cumsum(rng.integers(1, 50, size=(n, k)), axis=1).astype(float)
    table = Table(weights)
    known = Known(tuple(map(str, range(n))), (k,) * n, np.zeros((n, k)), False, (table,), False, (), (0,))
    low, high = weights[:, 0].sum(), weights[:, -1].sum()
    return known, table, float(low + rng.uniform(0.2, 0.9) * (high - low))


def test_evolutions_offspring_fill_the_budget_and_never_exceed_it():
    rng = np.random.default_rng(0)
    for _ in range(100):
        known, table, budget = random_known(rng)
        parent = tuple(rng.integers(5, size=20).tolist())
        child = switch_levels(known, table, budget, parent, 2, rng)
        room = budget - table.of(child)
        assert room >= 0
        # Of the layers that were not lowered, none can have a level more.
        kept = [i for i in range(20) if parent[i] <= child[i] < 4]
        assert all(table.parts[i, child[i] + 1] - table.parts[i, child[i]] > room for i in kept)


def test_evolution_switches_few_layers_of_the_best_known_at_the_budget():
    toy = Toy(40, 5, 3)
    study = toy.study("evolution", options={"budgets": 1, "max_switches": 1})
    best, changed, before = None, [], np.inf
    for number in range(40):
        proposal = study.ask(number)
        loss = toy.total(toy.true, proposal)
        study.tell(number, [loss, 100.0 + toy.total(toy.size, proposal)])
        if best is not None:
            changed.append(sum(a != b for a, b in zip(proposal, best, strict=True)))
        if loss < before:
            best, before = proposal, loss
    assert max(changed) <= 8
    assert min(changed) == 2


def test_actor_critics_layers_give_up_levels_from_the_last_until_they_fit():
    table = Table(np.tile(np.arange(4.0), (3, 1)))
    known = Known(("a", "b", "c"), (4,) * 3, np.zeros((3, 4)), False, (table,), False, (), (0,))
    assert lower_to_fit(known, table, 9.0, np.array([3, 3, 3])) == (3, 3, 3)
    assert lower_to_fit(known, table, 5.0, np.array([3, 3, 3])) == (2, 2, 1)
    assert lower_to_fit(known, table, 2.0, np.array([3, 0, 3])) == (1, 0, 1)
    assert lower_to_fit(known, table, -1.0, np.array([3, 0, 3])) == (0, 0, 0)


def test_actor_critic_learns_which_kind_of_layer_to_spare():
    toy = Toy(16, 5, 4)
    blind = Prior({}, toy.prior.additive)
    study = toy.study("actor_critic", prior=blind, options={"budgets": 1, "decay": 0.95})
    losses = [toy.total(toy.true, p) for p in toy.play(study, 120)]
    assert np.mean(np.log(losses[-30:])) < np.mean(np.log(losses[:20])) - 0.3


def test_actor_critic_learns_the_same_from_scratch_as_step_by_step():
    toy = Toy(6, 4, 5)
    actor_critic._KEPT.clear()
    step_by_step, again = (toy.play(toy.study("actor_critic", options={"warmup": 3}), 12) for _ in range(2))
    assert again == step_by_step
    study = toy.study("actor_critic", options={"warmup": 3})
    from_scratch = []
    for number in range(12):
        actor_critic._KEPT.clear()
        from_scratch.append(study.ask(number))
        values = toy.total(toy.true, from_scratch[-1]), 100.0 + toy.total(toy.size, from_scratch[-1])
        study.tell(number, values)
    assert from_scratch == step_by_step


@pytest.mark.parametrize("every_choice", [False, True])
def test_probe_ilp_recovers_an_additive_loss_exactly(every_choice):
    """Predictions are wrong by a factor per layer; or missing, and each choice is measured."""
    toy = Toy(4, 4, 6, wrong=2.0)
    options = {"every_choice": every_choice, "probe": 1}
    prior = Prior({}, toy.prior.additive) if every_choice else None
    probes = 1 + 4 * (3 if every_choice else 1)
    proposals = toy.play(toy.study("probe_ilp", prior=prior, options=options), probes + 6)
    assert proposals[0] == [3] * 4
    assert {sum(i != 3 for i in p) for p in proposals[1:probes]} == {1}
    assert {i for p in proposals[1:5] for i in p} == {1, 3}
    for proposal in proposals[probes:]:
        best = toy.least(toy.true, toy.total(toy.size, proposal))
        assert toy.total(toy.true, proposal) == pytest.approx(best, rel=1e-6)


def test_probe_ilp_predicts_what_its_probes_did_not_reach():
    """With two of eight layers probed, the others keep the prediction's order, in the unit of the measured."""
    toy = Toy(8, 4, 7)
    scaled = Prior({n: 1e3 * v for n, v in toy.predicted.items()}, toy.prior.additive)
    proposals = toy.play(toy.study("probe_ilp", prior=scaled, options={"max_probes": 2}), 7)
    for proposal in proposals[3:]:
        best = toy.least(toy.true, toy.total(toy.size, proposal))
        assert toy.total(toy.true, proposal) == pytest.approx(best, rel=1e-6)


def shortfall(toy, proposals):
    """Mean log of the least loss within each of several sizes, beyond that of the true optimum there."""
    sizes = np.array([toy.total(toy.size, p) for p in proposals])
    losses = np.log([toy.total(toy.true, p) for p in proposals])
    exact = Prior(toy.true, toy.prior.additive)
    best = toy.play(toy.study("gradient_ilp", prior=exact), 40)
    found = []
    for b in best[2:]:
        fits = sizes <= toy.total(toy.size, b)
        if fits.any():
            found.append(losses[fits].min() - np.log(toy.total(toy.true, b)))
    return float(np.mean(found)), len(found)


def test_predictor_learns_from_trials_what_the_prediction_had_wrong():
    toy = Toy(20, 5, 8, wrong=1.5)
    learned, reached = shortfall(toy, toy.play(toy.study("predictor"), 70))
    never, _ = shortfall(toy, toy.play(toy.study("gradient_ilp"), 70))
    drawn, _ = shortfall(toy, toy.play(toy.study("random"), 70))
    assert reached == 38
    assert learned < 0.75 * never < 0.75 * drawn


@pytest.mark.parametrize("sampler", ALTERNATIVES)
def test_bounds_on_known_sums_are_kept(sampler):
    """One on an objective, one on a sum that is none, which pulls the other way."""
    toy = Toy(12, 5, 9)
    sizes = [sum(float(v[i]) for v in toy.size.values()) for i in (0, -1)]
    high = 100.0 + 0.6 * sizes[1] + 0.4 * sizes[0]
    energy = {name: np.full(5, 3.0) - np.array([2.0, 0.0, 1.0, 0.0, 2.0]) * (i % 3) for i, name in enumerate(toy.names)}
    limit = Additive(0.0, energy, high=0.75 * sum(float(v.max()) for v in energy.values()))
    prior = Prior(toy.predicted, {1: Additive(100.0, toy.size, high=high)}, [limit])
    study = toy.study(sampler, prior=prior, n_constraints=2)
    probes = 13 if sampler == "probe_ilp" else 0
    for number in range(probes + 30):
        proposal = study.ask(number)
        size, spent = 100.0 + toy.total(toy.size, proposal), toy.total(energy, proposal)
        if number >= probes:
            assert size <= high
            assert spent <= limit.high
        study.tell(number, [toy.total(toy.true, proposal), size], [size - high, spent - limit.high])


@pytest.mark.parametrize("sampler", ALTERNATIVES)
def test_a_bounded_sum_is_spent_where_quality_is_all_that_counts(sampler):
    toy = Toy(12, 5, 10)
    ends = [sum(float(v[i]) for v in toy.size.values()) for i in (0, -1)]
    high = (ends[0] + ends[1]) / 2
    prior = Prior(toy.predicted, {}, [Additive(0.0, toy.size, high=high)])
    study = toy.study(sampler, prior=prior, directions=["minimize"], n_constraints=1)
    sizes = []
    for number in range(40):
        proposal = study.ask(number)
        sizes.append(toy.total(toy.size, proposal))
        study.tell(number, [toy.total(toy.true, proposal)], [sizes[-1] - high])
    late = np.array(sizes[20:])
    assert (late <= high).all()
    assert np.median(late) > high - 0.15 * (ends[1] - ends[0])


@pytest.mark.parametrize("sampler", ALTERNATIVES)
def test_nothing_is_proposed_twice_while_much_is_left(sampler):
    toy = Toy(8, 4, 11, wrong=0.5)
    proposals = toy.play(toy.study(sampler), 60)
    assert len(set(map(tuple, proposals))) == 60


def test_nondominated_keeps_equals_and_drops_the_beaten():
    values = np.array([[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [2.0, 3.0], [3.0, 1.0], [1.0, 4.0]])
    assert nondominated(values).tolist() == [True, True, True, False, True, False]


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0, math.inf]), min_size=n, max_size=n))
    )
)
def test_nondominated_is_what_no_row_beats(rows):
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 2)
    beaten = [any((b <= a).all() and (b < a).any() for b in values) for a in values]
    assert nondominated(values).tolist() == [not each for each in beaten]
