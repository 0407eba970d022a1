"""One claim of each sampler."""

import itertools

import numpy as np
import pytest
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler

from autoq.errors import BadInput
from autoq.search.optuna_study import AskTell, Row
from autoq.search.samplers import trial_seed


def asked(sampler, parameters, n, value=None, **changes):
    study = AskTell(parameters, ["minimize"], sampler, changes.pop("seed", 0), **changes)
    proposals = []
    for number in range(n):
        proposals.append(study.ask(number))
        study.tell(number, [float(value(proposals[-1]) if value else 0.0)])
    return proposals


def test_exhaustive_proposes_everything_once_around_what_is_fixed():
    sizes = (3, 1, 4, 2)
    study = AskTell([(f"p{i}", n) for i, n in enumerate(sizes)], ["minimize"], "exhaustive", 5)
    fixed = {0: [2, 0, 3, 1], 1: [0, 0, 0, 0], 9: [1, 0, 1, 1]}
    seen = []
    for number in itertools.count():
        if number in fixed:
            study.ask_fixed(number, fixed[number])
            seen.append(fixed[number])
        else:
            proposal = study.ask(number)
            if proposal is None:
                break
            seen.append(proposal)
        study.tell(number, None if number % 3 else [0.0])
    everything = set(itertools.product(*map(range, sizes)))
    assert set(map(tuple, seen)) == everything
    # At most the late fixed one had been proposed before.
    assert len(seen) <= len(everything) + 1
    assert study.exhausted


def test_exhaustive_remembers_its_place_across_a_restart():
    parameters = [("a", 5), ("b", 5)]
    whole = asked("exhaustive", parameters, 25)
    study = AskTell(parameters, ["minimize"], "exhaustive", 0)
    rows = [Row(n, i, "failed", attrs={"exhaustive:position": n}) for n, i in enumerate(whole[:24])]
    study.restore(rows, {})
    assert study.ask(24) == whole[24]
    assert study.ask(25) is None


def test_exhaustive_refuses_large_spaces():
    with pytest.raises(BadInput, match="at most 100,000 assignments and the space has 117,649"):
        asked("exhaustive", [(str(i), 7) for i in range(6)], 1)
    with pytest.raises(BadInput, match=r"the space has about 10\^163"):
        asked("exhaustive", [(str(i), 6) for i in range(210)], 1)


def test_gp_refuses_many_parameters_and_names_the_way_out():
    with pytest.raises(BadInput, match=r"at most 30 parameters and the space has 31; .* choose nsga2 or tpe"):
        asked("gp", [(str(i), 2) for i in range(31)], 1)


def test_sobol_covers_each_parameter_evenly():
    """Of the first 2^k points each quarter of every axis holds a quarter."""
    points = np.array(asked("qmc", [(str(i), 4) for i in range(5)], 64))
    counts = [np.bincount(column, minlength=4).tolist() for column in points.T]
    assert counts == [[16] * 4] * 5


def test_qmc_goes_on_after_fixed_trials_without_leaving_points_out():
    parameters = [(str(i), 4) for i in range(5)]
    study = AskTell(parameters, ["minimize"], "qmc", 0)
    study.ask_fixed(0, [0] * 5)
    assert [study.ask(number) for number in range(1, 9)] == asked("qmc", parameters, 8)


def test_random_is_uniform():
    points = np.array(asked("random", [("a", 4), ("b", 3), *((str(i), 4) for i in range(8))], 600))
    assert np.bincount(points[:, 0]).tolist() == pytest.approx([150] * 4, abs=40)
    assert np.bincount(points[:, 1]).tolist() == pytest.approx([200] * 3, abs=40)
    assert abs(np.corrcoef(points[:, :2].T)[0, 1]) < 0.15


@pytest.mark.parametrize(("sampler", "n"), [("nsga2", 200), ("nsga3", 200), ("tpe", 60), ("gp", 18)])
def test_those_that_learn_beat_random_draws(sampler, n):
    target = np.array([3, 0, 5, 2, 4, 1])
    parameters = [(str(i), 6) for i in range(6)]

    def distance(indices):
        return float(((np.array(indices) - target) ** 2).sum())

    late = [distance(p) for p in asked(sampler, parameters, n, distance)[-n // 5 :]]
    drawn = [distance(p) for p in asked("random", parameters, n, distance)]
    assert np.mean(late) < 0.6 * np.mean(drawn)


def test_random_draws_what_optuna_draws():
    draw = np.random.default_rng(0)
    sizes = [int(n) for n in draw.integers(2, 9, 40)]
    asking = AskTell([(f"p{i}", n) for i, n in enumerate(sizes)], ["minimize"], "random", 7)
    for number in range(5):
        own = RandomSampler(seed=trial_seed(7, number))
        drawn = [own.sample_independent(None, None, f"p{i}", IntDistribution(0, n - 1)) for i, n in enumerate(sizes)]
        assert asking.ask(number) == drawn
