"""Trials that begin and end in groups come to what they come to one by one, on every database behind the store."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.assignment import Assignment
from autoq.errors import NotFinite, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.search.outcomes import keep
from autoq.spec import build_spec
from autoq.store import Ending, NewTrial, TrialError

SPEC = build_spec({"model": {"id": "tiny"}, "name": "demo"})
OBJECTIVES = [("kl", "nats", "minimize"), ("accuracy", "fraction", "maximize")]
TRIALS = 8
SCHEMES = [parse_scheme(f"rtn-int{bits}-g64") for bits in range(2, 9)]


def assignment(index):
    return Assignment({"a": SCHEMES[index % 7], "b": SCHEMES[index // 7]})


def measured(values):
    per_token = np.array([[values[0], np.nan]], dtype=np.float32)
    return [
        Measurement("kl", values[0], "nats", "measured", "search", 0.5, 2, "cpu", {"threads": [1]}, per_token),
        Measurement("accuracy", values[1], "fraction", "measured", "search"),
    ]


def ending(trial, kind, attempt, values, worker):
    told = Ending(trial.id, attempt, 0.5, worker, sampler_attrs={"from": worker})
    if kind == "failed":
        return dataclasses.replace(told, error=TrialError("E", "said", "trace\0"))
    excess = {"kl.max": 0.25 if kind == "infeasible" else -0.5}
    return dataclasses.replace(told, measurements=measured(values), violations=excess, stopped=kind == "stopped")


def contents(store, study):
    """All that is stored but moments, counts of changes and ids."""
    of = {"id": 0, "study_id": 0, "study": "", "changed": 0, "created_at": None, "finished_at": None}
    trials = [dataclasses.replace(trial, **of) for trial in store.trials(study.id, with_assignments=True)]
    values = [store.token_values(study.id, number, "kl", "search") for number in range(TRIALS)]
    return trials, [None if found is None else found.tolist()[0][0] for found in values]


ENDS = st.lists(
    st.tuples(
        st.integers(0, TRIALS - 1),
        st.sampled_from(["complete", "complete", "complete", "infeasible", "stopped", "failed"]),
        st.sampled_from([1, 1, 1, 2]),
        st.tuples(*[st.integers(0, 3).map(float)] * 2),
    ),
    max_size=14,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(ends=ENDS, cuts=st.lists(st.integers(1, 6), min_size=14, max_size=14))
def test_groups_come_to_what_trials_come_to_one_by_one(store, ends, cuts):
    """Results twice, of another attempt, of what has ended: however grouped, the same are stored and refused."""
    new = [NewTrial(number, assignment(number), "sampler", None, {"n": number}) for number in range(TRIALS - 1)]
    new.append(NewTrial(TRIALS - 1, assignment(2), "sampler", repeats=2))
    grouped, single = store.create_study(SPEC, OBJECTIVES), store.create_study(SPEC, OBJECTIVES)
    begun = store.start_trials(grouped.id, new)
    alone = [store.start_trials(single.id, [each])[0] for each in new]
    assert contents(store, grouped) == contents(store, single)
    accepted = [store.end_trials([ending(alone[n], kind, a, v, str(i))])[0] for i, (n, kind, a, v) in enumerate(ends)]
    found = []
    while len(found) < len(ends):
        part = [(i, ends[i]) for i in range(len(found), min(len(ends), len(found) + cuts.pop()))]
        before = store.study(grouped.id).changes
        now = store.end_trials([ending(begun[n], kind, a, v, str(i)) for i, (n, kind, a, v) in part])
        found += now
        assert store.study(grouped.id).changes - before == any(record is not None for record in now)
        for record in filter(None, now):
            assert record == store.trial(grouped.id, record.number, with_assignments=False)
    assert [record is None for record in found] == [record is None for record in accepted]
    assert contents(store, grouped) == contents(store, single)
    assert [trial.number for trial in store.frontier(grouped.id)] == store.recompute_frontier(grouped.id)


def test_a_group_is_stored_as_a_whole_or_not_at_all(store):
    study = store.create_study(SPEC, OBJECTIVES)
    with pytest.raises(StoreError, match=r"has one of the trials 0 to 1 already; does another process run this study"):
        store.start_trials(study.id, [NewTrial(0, assignment(0), "seed"), *([NewTrial(1, assignment(1), "seed")] * 2)])
    assert store.trials(study.id) == []
    begun = store.start_trials(study.id, [NewTrial(number, assignment(number), "seed") for number in range(3)])
    before = contents(store, study), store.study(study.id).changes
    good = [ending(trial, "complete", 1, (1.0, 1.0), "w") for trial in begun]
    bad = dataclasses.replace(good[1], measurements=measured((math.nan, 1.0)))
    with pytest.raises(NotFinite):
        store.end_trials([good[0], bad, good[2]])
    unheard_of = dataclasses.replace(good[1], measurements=[dataclasses.replace(good[1].measurements[1], detail=None)])
    with pytest.raises((AssertionError, TypeError)):
        store.end_trials([good[0], unheard_of, good[2]])
    assert (contents(store, study), store.study(study.id).changes) == before


def test_what_one_result_fails_by_does_not_take_the_others_with_it(store):
    study = store.create_study(SPEC, OBJECTIVES)
    begun = store.start_trials(study.id, [NewTrial(number, assignment(number), "seed") for number in range(3)])
    good = [ending(trial, "complete", 1, (1.0, 1.0), "w") for trial in begun]
    bad = dataclasses.replace(good[1], violations={"kl.max": math.inf})
    with pytest.raises(NotFinite, match=r"^the excess over the constraint on kl\.max came out as inf$"):
        keep(store, [good[0], bad, good[2]])
    assert [trial.state for trial in store.trials(study.id)] == ["complete", "running", "complete"]
    assert keep(store, good)[0] is None, "it was stored before"
    assert [trial.state for trial in store.trials(study.id)] == ["complete"] * 3
