"""Results that come twice, late and out of order, through the real controller and the real store."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.search.controller import create_study, run_study
from autoq.search.executors import MAX_ATTEMPTS, Executor, Failure, Result
from autoq.store import Store

WORKERS = 4


class Mail(Executor):
    """Passes jobs to an executor and hands its results on as bad mail does. Of each result it decides once: now, later,
    twice, or as a worker that was thought dead, whose own result comes when the job was sent out again."""

    def __init__(self, inner, seed):
        self.inner, self.dice = inner, random.Random(seed)
        self.held, self.counts = [], dict.fromkeys(("late", "twice", "thought dead", "out of order"), 0)
        self.order = []

    def submit(self, job):
        self.order.append((job.key, job.attempt))
        self.inner.submit(job)

    def next(self, timeout=None):
        while (result := self.inner.next(0)) is not None:
            fate = self.dice.choice(["now", "now", "late", "twice", "dead"])
            if fate == "late":
                self.counts["late"] += 1
                self.held.append(result)
            elif fate == "twice":
                self.counts["twice"] += 1
                self.held += [result] * self.dice.randint(1, 3)
                return self.hand(result)
            elif fate == "dead" and result.job.attempt < MAX_ATTEMPTS:
                self.counts["thought dead"] += 1
                self.held.append(result)
                return Result(result.job, None, Failure("WorkerLost", "no word of it", crashed=True), 0.0, "gone")
            else:
                return self.hand(result)
            if self.held and self.dice.random() < 0.5:
                break
        if not self.held:
            return None
        return self.hand(self.held.pop(self.dice.randrange(len(self.held))))

    def ready(self):
        # Half of the time what comes is stored with what came before it.
        return self.next(0) if self.dice.random() < 0.5 else None

    def hand(self, result):
        first = next(key for key in self.order if key[0] == result.job.key)
        self.counts["out of order"] += first != self.order[0]
        return dataclasses.replace(result, worker="w")

    def close(self):
        self.inner.close()


@pytest.fixture(scope="module")
def calm(made_up, tiny_model_dir, tmp_path_factory):
    """Specs by seed, and what they come to without any fault."""
    known = {}
    with Store.open(str(tmp_path_factory.mktemp("calm") / "autoq.db")) as store:

        def of(seed, sampler):
            if (seed, sampler) not in known:
                more = {"workers": {"executor": "ray", "count": WORKERS}}
                spec = made_up.spec(tiny_model_dir("llama"), 16, seed, sampler, **more)
                study = create_study(store, spec)
                run_study(store, study.id, None, made_up.make)
                known[seed, sampler] = spec, made_up.outcome(store, study)
            return known[seed, sampler]

        yield of


def test_each_assignment_has_one_result_however_the_mail_is(calm, made_up, tmp_path, rounds, record_testsuite_property):
    total = {}
    with Store.open(str(tmp_path / "autoq.db")) as store:

        @settings(max_examples=rounds(6, 300), deadline=None)
        @given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from(["random", "nsga2"]))
        def holds(mail, seed, sampler):
            spec, whole = calm(seed, sampler)
            study = create_study(store, spec)
            made, witness = [], made_up.Witness()

            def make(spec):
                made.append(Mail(made_up.make(spec), mail))
                return made[0]

            run_study(store, study.id, witness, make)
            made_up.check(store, study, witness, whole)
            assert not store.running_trials(study.id)
            for name, count in made[0].counts.items():
                total[name] = total.get(name, 0) + count

        holds()
    assert all(total.values()), total
    record_testsuite_property("mail", f"{total}")
