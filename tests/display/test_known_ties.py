"""Ties that are kept: whatever came and went, they are those of all trials at once."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.display.ties import KnownTies, ties
from autoq.measurement import Measurement
from autoq.store import StudyObjective, TrialRecord

OBJECTIVES = (StudyObjective("kl", "nats/token", "minimize"), StudyObjective("size", "bytes", "minimize"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def trial(number, changed, loss, size):
    measured = {
        ("kl", "search"): Measurement("kl", loss, "nats/token", "measured", "search", 0.3),
        ("size", "search"): Measurement("size", size, "bytes", "computed", "search"),
    }
    return TrialRecord(
        id=number, study_id=1, study="s", number=number, state="complete", origin="sampler", baseline=None, hash="h",
        duplicate_of=None, attempt=1, changed=changed, feasible=True, on_frontier=True, violations={},
        sampler_attrs={}, error=None, worker=None, seconds=1.0, created_at=NOW, finished_at=NOW, measurements=measured,
    )  # fmt: skip


def values_of(trials):
    losses = {each.number: each.measurements["kl", "search"].value for each in trials}

    def values(number, name, part):
        if name != "kl" or number % 3 == 0:
            return None
        rng = np.random.default_rng(number)
        return (losses[number] + rng.normal(0, 1, (2, 64))).astype(np.float32)

    return values


STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)), max_size=8, unique_by=lambda t: t[0]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_kept_ties_are_those_of_all_trials_at_once(steps):
    known, there, change = KnownTies(), {}, 0
    for step in steps:
        following = {}
        for number, loss, size in sorted(step):
            change += 1
            made = trial(number, change, float(loss), float(size))
            old = there.get(number)
            same = old is not None and dataclasses.replace(old, changed=change) == made
            following[number] = old if same else made
        there = following
        frontier = list(there.values())
        assert known.update(frontier, OBJECTIVES, values_of(frontier)) == ties(
            frontier, OBJECTIVES, values_of(frontier)
        )
