"""Eight processes that all do to the same studies what only one should: submit, cancel, resume, run, repeat, remove."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys

import pytest

from autoq.store import Store
from autoq.store.copying import copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROCESSES = 8
# Each process forks from one that has imported everything, opens the database for itself, and prints what it was told
# is stored, a line each, and any error that nobody should see.
WRITER = """
import json, os, random, sys, traceback
from autoq.assignment import Assignment
from autoq.errors import BadInput, Conflict, LeaseLost, LimitReached, NotFound, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Prepared, Store

url, steps, many = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
SCHEMES = [parse_scheme(f"rtn-int{bits}-g64") for bits in range(2, 9)]

def assignment(number):
    return Assignment({f"layer.{place}": SCHEMES[number // 7**place % 7] for place in range(4)})

def measured(value, number, part="search"):
    return [Measurement(name, float(v), unit, "measured", part, 0.1, 10)
            for (name, unit, _), v in zip(OBJECTIVES, (value, 10**6 / (1 + number % 97)))]

class Process:
    def __init__(self, store, me):
        self.store, self.me, self.dice = store, me, random.Random(me)
        self.known = []  # (trial id, study, number, attempt) that it has heard of

    def told(self, *what):
        os.write(1, (json.dumps(what) + "\\n").encode())

    def pick(self):
        while not (studies := self.store.studies()):
            self.submit()
        return self.dice.choice(studies).id

    def submit(self):
        key, user = f"k{self.dice.randrange(12)}", self.dice.choice(["ann", "bob"])
        spec = build_spec({"model": {"id": "tiny"}, "name": key})
        study, _ = self.store.queue.submit(user, key, key, spec, Prepared(OBJECTIVES, {"t": [1]}))
        self.told("submitted", user, key, study.id)

    def remove(self):
        study = self.pick()
        self.store.queue.remove(study, "ann")
        self.told("removed", study)

    def cancel(self): self.store.queue.cancel(self.pick())
    def enqueue(self): self.store.queue.enqueue(self.pick(), self.dice.choice([None, 10**6]))
    def yields(self): self.store.queue.ask(self.pick(), self.dice.choice(["yield", None]))
    def settle(self): self.store.queue.settle(self.pick(), self.dice.choice(["finished", "interrupted", "queued"]))
    def tables(self): self.store.put_table(self.pick(), "t", [self.dice.random()])

    def remark(self):
        study, number, note = self.pick(), self.dice.randrange(5), f"{self.me}:{self.dice.random()}"
        self.store.remarks.put(study, number, note, ["t"], "ann")
        self.told("remarked", study, number, note)

    def run(self):
        study = self.pick()
        epoch = self.store.queue.acquire(study, f"host{self.me}:1:0:0", self.dice.choice([0.02, 5.0]))
        if epoch is None:
            return
        mine = self.store.under(study, epoch)
        try:
            number = 1 + max((t.number for t in mine.trials(study)), default=-1)
            trial = mine.start_trial(study, number, assignment(number), "sampler", None, {"n": number})
            self.known.append((trial.id, study, number, 1))
            if self.dice.random() < 0.7:
                self.end(mine, *self.known[-1])
        finally:
            self.store.queue.release(study, epoch)

    def end(self, store, trial, study, number, attempt):
        how, value = self.dice.choice(["finish", "finish", "finish", "stop", "fail"]), self.dice.random()
        if how == "fail":
            stored = store.fail_trial(trial, attempt, "E", "m", "t", 1.0, "w")
        else:
            call = store.finish_trial if how == "finish" else store.stop_trial
            stored = call(trial, attempt, measured(value, number), {}, 1.0, "w")
        if stored:
            self.told("ended", how, study, number, attempt, value)

    def repeat(self):
        # A result that was sent before, or by somebody whose lease is over.
        if self.known:
            self.end(self.store, *self.dice.choice(self.known))

    def retry(self):
        for trial in self.store.running_trials(self.pick())[:2]:
            self.known.append((trial.id, trial.study_id, trial.number, self.store.retry_trial(trial.id)))

    def report(self):
        study = self.pick()
        for trial in self.store.frontier(study)[:2]:
            self.store.add_measurements(trial.id, measured(trial.number, trial.number, "report"))
            self.told("reported", study, trial.number)

    def read(self):
        study = self.pick()
        self.store.trial_columns(study)
        self.store.feed.chunk(study, 0, 20)
        self.store.queue.waiting(), self.store.queue.running()

    def go(self):
        deeds = [self.submit, self.cancel, self.enqueue, self.yields, self.settle, self.tables, self.remark]
        deeds += [self.report, self.remove] + [self.run] * 6 + [self.repeat] * 3 + [self.retry] * 2 + [self.read] * 2
        self.submit()
        for _ in range(steps):
            deed = self.dice.choice(deeds)
            try:
                deed()
                self.told("did", deed.__name__)
            except (BadInput, Conflict, LeaseLost, LimitReached, NotFound) as problem:
                self.told("refused", deed.__name__, type(problem).__name__)
            except StoreError as problem:
                # Two began the trial of one number, or one ended it before the other sent it out again.
                known = "does another process run this study?" in str(problem) or "cannot run again" in str(problem)
                self.told("refused" if known else "problem", deed.__name__, str(problem))
            except BaseException:
                self.told("problem", deed.__name__, traceback.format_exc())

children = []
for me in range(many):
    if (pid := os.fork()) == 0:
        with Store.open(url) as store:
            Process(store, me).go()
        os._exit(0)
    children.append(pid)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, postgresql, tmp_path):
    if request.param == "sqlite":
        yield str(tmp_path / "autoq.db")
        return
    server = postgresql.Server(postgresql.binaries())
    yield server.fresh()
    server.stop()


def test_whoever_writes_what_is_told_stays_and_comes_once(url, rounds, record_testsuite_property):
    steps = rounds(15, 600)
    with Store.open(url):
        pass
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-c", WRITER, url, str(steps), str(PROCESSES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = collections.defaultdict(list)
    for line in done.stdout.splitlines():
        what, *rest = json.loads(line)
        told[what].append(rest)
    assert told["problem"] == []
    assert told["ended"]
    assert len(told["did"]) + len(told["refused"]) == steps * PROCESSES
    with Store.open(url) as store:
        studies, removed = {study.id for study in store.studies()}, [each.id for each in store.queue.removals()]
        assert sorted(removed) == sorted(study_id for (study_id,) in told["removed"])
        assert not studies & set(removed)
        keys = collections.defaultdict(set)
        for user, key, study_id in told["submitted"]:
            keys[user, key].add(study_id)
        assert set().union(*keys.values()) == studies | set(removed)
        assert all(len(ids & studies) <= 1 for ids in keys.values()), "a key has two studies"
        for what in ("ended", "reported", "remarked"):
            told[what] = [each for each in told[what] if not set(removed) & {each[what == "ended"]}]
        trials = {(study_id, t.number): t for study_id in studies for t in store.trials(study_id)}
        results = collections.Counter()
        for how, study_id, number, attempt, value in told["ended"]:
            found = trials[study_id, number]
            if how == "fail":
                assert found.attempt >= attempt
                continue
            results[study_id, number] += 1
            assert (found.state, found.attempt) == ({"finish": "complete", "stop": "stopped"}[how], attempt)
            assert found.measurements["kl_nats_per_token", "search"].value == value
        assert set(results.values()) <= {1}, "an assignment has two final results"
        assert len(results) == sum(t.state in ("complete", "stopped") for t in trials.values())
        for study_id, number in map(tuple, told["reported"]):
            assert trials[study_id, number].measurements["kl_nats_per_token", "report"].value == number
        notes = collections.defaultdict(set)
        for study_id, number, note in told["remarked"]:
            notes[study_id, number].add(note)
        for (study_id, number), written in notes.items():
            assert store.remarks.of(study_id, number)[0].note in written
        for study_id in studies:
            assert [t.number for t in store.frontier(study_id)] == store.recompute_frontier(study_id)
            own = sorted(number for study, number in trials if study == study_id)
            assert own == list(range(len(own)))
        assert copy(store, None).left_out == []
    refused = collections.Counter(kind for _, kind in told["refused"] if kind.isalpha())
    record_testsuite_property(
        f"hostile writers on {url.partition(':')[0]}",
        f"{len(told['did'])} deeds, {len(results)} results, {len(removed)} studies removed, {dict(refused)} refused",
    )
