"""The store as a machine: whatever is done to it in whatever order, it says what a model in a few dictionaries says."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from autoq.assignment import Assignment
from autoq.errors import Conflict, LeaseLost, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Prepared
from autoq.store.copying import copy

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("accuracy", "fraction", "maximize")]
PREPARED = Prepared(OBJECTIVES, {})
VALUES = st.tuples(*[st.integers(0, 4).map(float)] * 2)
CHOICE = st.integers(0, 10**6)


def measured(values, part="search"):
    return [
        Measurement(name, value, unit, "measured", part)
        for (name, unit, _), value in zip(OBJECTIVES, values, strict=True)
    ]


class Machine(RuleBasedStateMachine):
    """Studies of two users, their leases (an epoch that holds, others that are over), and trials by (study, number):
    state, attempt and the values of the one result."""

    def __init__(self, store):
        super().__init__()
        self.store, self.studies, self.epochs, self.trials, self.round = store, {}, {}, {}, len(store.studies())
        self.changes = {}

    def one(self, of, choice):
        return sorted(of)[choice % len(of)]

    def under(self, study, old):
        """The store of who holds a study, or of one who did."""
        epoch = self.epochs.get(study, 0)
        return self.store.under(study, epoch - 1 if old else epoch), old or not epoch

    @rule(key=st.integers(0, 2), user=st.sampled_from(["ann", "bob"]), body=st.integers(0, 3))
    def submit(self, key, user, body):
        name = f"{self.round}-{key}"
        spec = build_spec({"model": {"id": "tiny"}, "name": name})
        known = self.studies.get((user, key))
        if known is not None and known[1] != body:
            with pytest.raises(Conflict):
                self.store.queue.submit(user, name, str(body), spec, PREPARED)
            return
        study, new = self.store.queue.submit(user, name, str(body), spec, PREPARED)
        assert new == (known is None)
        assert known is None or known[0] == study.id
        self.studies[user, key] = study.id, body

    @precondition(lambda self: self.studies)
    @rule(choice=CHOICE)
    def take(self, choice):
        study = self.one(self.studies.values(), choice)[0]
        epoch = self.store.queue.acquire(study, f"elsewhere:{choice}:0:0", 0.0)  # over as soon as it is taken
        assert epoch == self.epochs.get(study, 0) + 1
        self.epochs[study] = epoch

    @precondition(lambda self: self.epochs)
    @rule(choice=CHOICE, old=st.booleans())
    def start(self, choice, old):
        study = self.one(self.epochs, choice)
        number = sum(known == study for known, _ in self.trials)
        assignment = Assignment({"a": parse_scheme(f"rtn-int{2 + choice % 7}-g64"), f"n{number}": parse_scheme("keep")})
        store, lost = self.under(study, old)
        if lost:
            with pytest.raises(LeaseLost):
                store.start_trial(study, number, assignment, "sampler")
            return
        trial = store.start_trial(study, number, assignment, "sampler")
        self.trials[study, number] = [trial.id, "running", 1, None]

    @precondition(lambda self: self.trials)
    @rule(choice=CHOICE, how=st.sampled_from(["complete", "stopped", "failed"]), values=VALUES, late=st.integers(0, 2),
          old=st.booleans(), violation=st.sampled_from([-1.0, 1.0]))  # fmt: skip
    def end(self, choice, how, values, late, old, violation):
        study, number = self.one(self.trials, choice)
        trial = self.trials[study, number]
        attempt = max(1, trial[2] - late // 2)
        store, lost = self.under(study, old)

        def call():
            if how == "failed":
                return store.fail_trial(trial[0], attempt, "E", "m", "t", 1.0, "w")
            act = store.finish_trial if how == "complete" else store.stop_trial
            return act(trial[0], attempt, measured(values), {"c": violation}, 1.0, "w")

        if lost:
            with pytest.raises(LeaseLost):
                call()
            return
        wanted = trial[1] == "running" and attempt == trial[2]
        assert call() is wanted
        if wanted:
            trial[1:] = how, attempt, None if how == "failed" else (values, violation <= 0)

    @precondition(lambda self: self.trials)
    @rule(choice=CHOICE)
    def retry(self, choice):
        trial = self.trials[self.one(self.trials, choice)]
        if trial[1] in ("running", "failed"):
            assert self.store.retry_trial(trial[0]) == trial[2] + 1
            trial[1:3] = "running", trial[2] + 1
        else:
            with pytest.raises(StoreError, match="cannot run again"):
                self.store.retry_trial(trial[0])

    @precondition(lambda self: self.trials)
    @rule(choice=CHOICE, values=VALUES)
    def report(self, choice, values):
        trial = self.trials[self.one(self.trials, choice)]
        if trial[1] == "complete":
            self.store.add_measurements(trial[0], measured(values, "report"))
        else:
            with pytest.raises(StoreError, match="is not complete"):
                self.store.add_measurements(trial[0], measured(values, "report"))

    @precondition(lambda self: self.studies)
    @rule(choice=CHOICE, what=st.sampled_from(["cancel", "enqueue", "settle", "ask", "remark"]))
    def meddle(self, choice, what):
        study, queue = self.one(self.studies.values(), choice)[0], self.store.queue
        before = self.store.study(study).state
        try:
            if what == "cancel":
                queue.cancel(study)
            elif what == "enqueue":
                queue.enqueue(study)
            elif what == "settle":
                queue.settle(study, "interrupted")
            elif what == "ask":
                queue.ask(study, "yield")
            elif (study, 0) in self.trials:
                self.store.remarks.put(study, 0, f"{choice}", ["a"], "ann")
                assert self.store.remarks.of(study, 0)[0].note == f"{choice}"
        except Conflict:
            assert (what == "cancel") == (before not in ("queued", "running"))

    @invariant()
    def says_what_the_model_says(self):
        for study, _ in self.studies.values():
            found = {trial.number: trial for trial in self.store.trials(study)}
            assert found.keys() == {number for known, number in self.trials if known == study}
            for number, trial in found.items():
                _, state, attempt, result = self.trials[study, number]
                assert (trial.state, trial.attempt) == (state, attempt)
                if result is not None:
                    assert trial.values([name for name, _, _ in OBJECTIVES]) == result[0]
                elif state != "complete":
                    assert not trial.measurements
            frontier = [trial.number for trial in self.store.frontier(study)]
            assert frontier == self.store.recompute_frontier(study)
            assert set(frontier) <= {n for n, t in found.items() if t.state == "complete" and t.feasible}
            changes = self.store.study(study).changes
            assert changes >= self.changes.get(study, 0)
            self.changes[study] = changes

    def teardown(self):
        if self.studies:
            assert copy(self.store, None).left_out == []


@pytest.mark.timeout(3600)
def test_whatever_is_done_in_whatever_order(store):
    examples = 150 if os.environ.get("AUTOQ_FAULTS") == "long" else 4
    run_state_machine_as_test(
        lambda: Machine(store),
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
