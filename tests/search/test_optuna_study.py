"""The bridge to Optuna: numbering, results, what is persisted, what is refused, and its speed."""

import json
import math
import warnings

import numpy as np
import optuna
import pytest

from autoq.errors import BadInput, UnknownName
from autoq.search.optuna_study import AskTell, Row


def make(n=6, sampler="nsga2", **changes):
    arguments = {"options": {}, "n_constraints": 0, "n_startup": 0, "seed": 1, "directions": ["minimize", "minimize"]}
    return AskTell([(f"p{i}", 4) for i in range(n)], sampler=sampler, **(arguments | changes))


def test_an_unknown_sampler_and_bad_options_are_refused_in_one_line():
    with pytest.raises(UnknownName, match=r"no sampler 'nsga'.*choose from actor_critic"):
        make(sampler="nsga")
    with pytest.raises(BadInput, match=r"sampler 'nsga2': option 'population_size' must be at least 2 \(got 1\)"):
        make(options={"population_size": 1})
    with pytest.raises(BadInput, match="option 'mutation_prob' must be at most 1"):
        make(options={"mutation_prob": 1.5})
    with pytest.raises(BadInput, match="option 'mutation_prob' must be at least 0"):
        make(options={"mutation_prob": math.nan})
    with pytest.raises(BadInput, match="option 'population_size' must be of type int"):
        make(options={"population_size": True})


def test_an_option_left_at_null_is_the_default():
    assert make(options={"population_size": None}).ask(0) == make().ask(0)


def test_numbers_must_come_in_order():
    study = make()
    study.ask(0)
    with pytest.raises(AssertionError, match="trial 2 is asked for and 1 is next"):
        study.ask(2)
    with pytest.raises(AssertionError, match="row 1 is given and 0 is next"):
        make().restore([Row(1, [0] * 6, "running")], {})


def test_nan_and_a_wrong_number_of_values_are_our_own_bugs():
    study = make(n_constraints=1)
    study.ask(0)
    for values, constraints in (([1.0, math.nan], [0.0]), ([1.0], [0.0]), ([1.0, 1.0], []), ([1.0, 1.0], [math.nan])):
        with pytest.raises(AssertionError):
            study.tell(0, values, constraints)
    study.tell(0, [1.0, math.inf], [0.0])


def test_indices_out_of_range_leave_no_trial_behind():
    study = make()
    with pytest.raises(AssertionError):
        study.ask_fixed(0, [0, 0, 0, 0, 0, 4])
    study.ask_fixed(0, [0, 0, 0, 0, 0, 3])


def test_seeds_are_the_first_generation_of_a_genetic_sampler():
    """With a population of exactly the seeds, all equal in two parameters, children inherit those."""
    study = make(n=40, n_startup=20, options={"mutation_prob": 0.0})
    rng = np.random.default_rng(0)
    for number in range(20):
        indices = [3, 1, *rng.integers(0, 4, 38).tolist()]
        study.ask_fixed(number, indices)
        assert study.attrs(number) == {"NSGAIISampler:generation": 0}
        study.tell(number, [float(sum(indices)), -float(indices[-1])])
    child = study.ask(20)
    assert child[:2] == [3, 1]
    assert study.attrs(20) == {"NSGAIISampler:generation": 1}


def test_constraints_reach_the_sampler():
    """Only feasible parents win tournaments, so children move to the feasible side."""

    def mean_of_first_child(n_constraints):
        total = 0
        for seed in range(10):
            study = make(n=30, n_startup=20, n_constraints=n_constraints, seed=seed)
            for number in range(20):
                low = number % 2 == 0
                study.ask_fixed(number, [0 if low else 3] * 30)
                # The infeasible dominate the feasible.
                study.tell(number, [float(low)] * 2, [0.0 if low else 5.0][:n_constraints])
            total += sum(study.ask(20))
        return total

    assert mean_of_first_child(1) < mean_of_first_child(0)


def test_directions_are_honoured():
    proposals = []
    for direction, sign in (("minimize", 1.0), ("maximize", -1.0)):
        study = make(sampler="tpe", directions=[direction], n_startup=1)
        for number in range(16):
            proposal = study.ask(number)
            study.tell(number, [sign * sum(proposal)])
        proposals.append(proposal)
    assert proposals[0] == proposals[1]


def test_running_trials_are_seen_by_tpe():
    def fifth(pending):
        study = make(sampler="tpe", directions=["minimize"], options={"n_startup_trials": 4})
        rows = [Row(i, [i % 4] * 6, "complete", [float(i)]) for i in range(6)]
        study.restore([*rows, Row(6, [0] * 6, "running" if pending else "failed")], {})
        return [study.ask(number) for number in range(7, 15)]

    assert fifth(pending=True) != fifth(pending=False)


def test_what_is_persisted_stays_small():
    """Parameters and constraints have columns of their own; of the parents two generations are kept."""
    study = make(sampler="tpe", n_constraints=1, options={"n_startup_trials": 1})
    for number in range(3):
        study.ask(number)
        study.tell(number, [1.0, 2.0], [0.5])
        assert study.attrs(number) == {}
    study = make(options={"population_size": 4})
    for number in range(60):
        study.tell(number, [float(sum(study.ask(number))), 0.0])
    assert study.study_attrs().keys() == {"NSGAIISampler:parent:13", "NSGAIISampler:parent:14"}


def test_it_is_silent_and_leaves_logging_and_warnings_as_they_are(capfd):
    before = optuna.logging.get_verbosity(), list(warnings.filters)
    study = make(sampler="nsga3", directions=["minimize", "minimize", "maximize"])
    study.ask(0)
    study.tell(0, None)
    assert capfd.readouterr() == ("", "")
    assert (optuna.logging.get_verbosity(), list(warnings.filters)) == before


def test_a_thousand_trials_of_210_parameters_are_restored_and_gone_on_from():
    rng = np.random.default_rng(0)
    rows = [
        Row(
            n,
            i.tolist(),
            "complete",
            [float((0.25**i).sum()), float(i.sum())],
            [0.0],
            {"NSGAIISampler:generation": n // 50},
        )
        for n, i in enumerate(rng.integers(0, 6, (1000, 210)))
    ]
    study = AskTell([(f"p{i}", 6) for i in range(210)], ["minimize"] * 2, "nsga2", 0, n_constraints=1, n_startup=50)
    study.restore(rows, json.loads("{}"))
    study.ask(1000)
    study.tell(1000, [1.0, 1.0], [0.0])
    for number in range(1001, 1011):
        proposal = study.ask(number)
        assert len(proposal) == 210
        assert set(proposal) <= set(range(6))
        study.tell(number, [1.0, 1.0], [0.0])
