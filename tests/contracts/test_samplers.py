"""What every sampler owes: its name's file, a valid proposal, and the same one after a restart."""

import json
import math

import pytest

from autoq import plugins
from autoq.errors import BadInput
from autoq.search.optuna_study import AskTell, Row
from autoq.search.samplers import Sampler

PARAMETERS = [("a", 3), ("b", 1), ("c", 4), ("d", 2), ("e", 3)]
N_FIXED, N_TRIALS, FAILED = 3, 11, 4


def make(name, **changes):
    # Small, so that every sampler is past its start and a genetic one past its first generations.
    small = {"n_startup_trials": 4, "population_size": 4}
    known = plugins.load("search.samplers", name, Sampler).options
    arguments = {
        "parameters": PARAMETERS,
        "directions": ["minimize", "maximize"],
        "sampler": name,
        "seed": 7,
        "options": {key: value for key, value in small.items() if key in known},
        "n_constraints": 1,
        "n_startup": N_FIXED,
    }
    return AskTell(**(arguments | changes))


def measure(indices):
    quality = sum(math.exp(-i) * (k + 1) for k, i in enumerate(indices))
    size = float(sum(indices))
    return [math.inf if size == 0 else quality, -size], [size - 6.0]


def play(study, rows, stop):
    """Two workers' worth of trials: each is told after the next one is asked for. Extends `rows`."""
    for number in range(len(rows), stop):
        if number < N_FIXED:
            indices = [number, 0, number, number % 2, 0]
            study.ask_fixed(number, indices)
        else:
            indices = study.ask(number)
        rows.append(Row(number, indices, "running", attrs=study.attrs(number)))
        if number > 0:
            finish(study, rows, number - 1)


def finish(study, rows, number):
    row = rows[number]
    values, constraints = measure(row.indices)
    if number == FAILED:
        values, constraints = None, []
    study.tell(number, values, constraints)
    state = "failed" if values is None else "complete"
    rows[number] = Row(number, row.indices, state, values, constraints, study.attrs(number))


def through_json(rows):
    return [Row(**data) for data in json.loads(json.dumps([vars(row) for row in rows]))]


@pytest.mark.parametrize("name", plugins.names("search.samplers"))
class TestSampler:
    def test_it_has_a_one_line_summary(self, name):
        summary = plugins.summary("search.samplers", name)
        assert 20 < len(summary) < 120
        assert summary.endswith(".")

    def test_options_explain_themselves_and_unknown_ones_are_refused_with_the_choices(self, name):
        plugin = plugins.load("search.samplers", name, Sampler)
        assert all(option.help for option in plugin.options.values())
        with pytest.raises(BadInput, match=f"sampler '{name}': no option 'populaton'.* choose from"):
            make(name, options={"populaton": 3})

    def test_proposals_are_valid_and_change(self, name):
        study, rows = make(name), []
        play(study, rows, N_TRIALS)
        sizes = [n for _, n in PARAMETERS]
        assert all(0 <= i < n for row in rows for i, n in zip(row.indices, sizes, strict=True))
        assert len({tuple(row.indices) for row in rows[N_FIXED:]}) > 3

    def test_the_same_seed_repeats_and_another_differs(self, name):
        runs = []
        for seed in (7, 7, 8):
            rows = []
            play(make(name, seed=seed), rows, 7)
            runs.append([row.indices for row in rows])
        assert runs[0] == runs[1] != runs[2]

    def test_a_restored_study_goes_on_as_if_never_interrupted(self, name):
        whole = []
        play(make(name), whole, N_TRIALS)
        rows, study = [], make(name)
        for stop in (1, 4, 6, 9, N_TRIALS):
            play(study, rows, stop)
            attributes = json.loads(json.dumps(study.study_attrs()))
            rows = through_json(rows)
            study = make(name)
            study.restore(rows, attributes)
        assert [row.indices for row in rows] == [row.indices for row in whole]
        assert rows == through_json(whole)

    def test_a_space_without_a_choice_is_proposed_once(self, name):
        study = make(name, parameters=[("a", 1), ("b", 1)], n_startup=0)
        assert study.ask(0) == [0, 0]
        assert study.exhausted
        assert study.ask(1) is None

    def test_one_objective_without_constraints(self, name):
        study = make(name, directions=["minimize"], n_constraints=0, n_startup=0)
        for number in range(8):
            study.tell(number, [float(sum(study.ask(number)))])
