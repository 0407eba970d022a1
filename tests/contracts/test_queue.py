"""The queue on every database: submissions that are one, leases that one holds, and what waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from autoq.assignment import Assignment
from autoq.errors import BadInput, Conflict, LeaseLost, LimitReached, NotFound, StoreError, StudyBusy
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.search.holding import holding
from autoq.spec import build_spec
from autoq.store import Prepared, Store, WorkerRecord, holders, leases, queue
from autoq.store.queue_submissions import Submission

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
TABLES = {"layers": {"a": {"inputs": 4}}, "recipes": [{"baseline": "recipe:x"}]}
PREPARED = Prepared(OBJECTIVES, TABLES, {"layers": 1})


def spec(name="demo", trials=96):
    return build_spec({"model": {"id": "tiny"}, "name": name, "budget": {"trials": trials}})


def submit(store, key=None, user="ann", fingerprint="f", name="demo", **more):
    return store.queue.submit(user, key, fingerprint, spec(name), PREPARED, **more)


def add_trial(store, study_id, number, bits=4):
    trial = store.start_trial(study_id, number, Assignment({"a": parse_scheme(f"rtn-int{bits}-g64")}), "sampler")
    found = [Measurement(name, 1.0, unit, "measured", "search") for name, unit, _ in OBJECTIVES]
    assert store.finish_trial(trial.id, 1, found, {}, 1.0, "w")


# Submissions


def test_a_submission_is_a_queued_study_with_its_tables_and_its_owner(store):
    study, new = submit(store, "k", priority=2)
    assert new
    assert (study.state, study.owner, study.priority, study.request) == ("queued", "ann", 2, None)
    assert study.queued_at is not None
    assert store.table(study.id, "layers") == TABLES["layers"]
    assert store.table(study.id, "recipes") == TABLES["recipes"]
    assert store.table(study.id, "job") == {"kind": "run"}
    assert [s.id for s in store.queue.queued()] == [study.id]


def test_the_same_key_gives_the_same_study_and_another_body_is_refused(store):
    first, _ = submit(store, "k")
    assert submit(store, "k") == (first, False)
    assert store.queue.submitted("ann", "k", "f") == first
    assert store.queue.submitted("ann", "other", "f") is None
    with pytest.raises(Conflict, match="'k' was used for another study"):
        submit(store, "k", fingerprint="g")
    with pytest.raises(Conflict, match="'k' was used for another study"):
        store.queue.submitted("ann", "k", "g")
    assert len(store.studies()) == 1


def test_keys_are_their_users_own(store):
    ids = {submit(store, "k", user=user)[0].id for user in ("ann", "bob", None)}
    assert len(ids) == 3
    assert submit(store, "k", user=None)[1] is False


def test_without_a_key_every_submission_is_a_study(store):
    names = [submit(store)[0].name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.parametrize(("user", "key"), [("", "k"), ("u" * 65, "k"), ("ann", ""), ("ann", "k" * 129)])
def test_users_and_keys_that_no_column_holds_are_refused(store, user, key):
    with pytest.raises(BadInput, match=r"must have 1 to (64|128) characters"):
        submit(store, key, user=user)


def test_one_key_from_two_hundred_threads_makes_one_study_that_everybody_gets(store):
    start = threading.Barrier(200)

    def one(_):
        start.wait()
        return submit(store, "k")

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(one, range(200)))
    assert len({study.id for study, _ in found}) == 1
    assert sum(new for _, new in found) == 1
    assert len(store.studies()) == 1


def test_many_keys_at_once_make_a_study_each_and_none_is_lost(store):
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda i: submit(store, f"k{i}", user=f"u{i % 3}"), range(100)))
    assert all(new for _, new in found)
    assert len({study.id for study, _ in found}) == len({study.name for study, _ in found}) == 100


def test_a_users_limit_holds_when_all_come_at_once(store):
    def one(i):
        try:
            return submit(store, f"k{i}", limit=7)
        except LimitReached as problem:
            return str(problem)

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(one, range(30)))
    refused = [text for text in found if isinstance(text, str)]
    assert set(refused) == {"ann has 7 studies queued or running; 7 are allowed at a time"}
    assert len(found) - len(refused) == len(store.studies()) == 7
    # Who repeats what was accepted is not refused, and others are not counted.
    kept = next(i for i, each in enumerate(found) if not isinstance(each, str))
    assert submit(store, f"k{kept}", limit=7)[1] is False
    assert submit(store, "k", user="bob", limit=7)[1]


def submission(key=None, user="ann", fingerprint="f", name="demo", prepared=PREPARED, limit=None):
    return Submission(user, key, fingerprint, spec(name), prepared, 0, limit)


def test_submissions_at_once_are_each_judged_for_itself(store):
    first, _ = submit(store, "old", name="there")
    found = store.queue.submit_all([
        submission("a"), submission("a"), submission("a", fingerprint="g"), submission("a", user="bob", name="demo-2"),
        submission("old"), submission(None), submission(None), submission("k" * 200), submission("z", limit=4),
        submission("y", limit=6), submission("x", limit=5),
    ])  # fmt: skip
    told = [(each[0].name, each[1]) if isinstance(each, tuple) else type(each) for each in found]
    assert told == [
        ("demo", True), ("demo", False), Conflict, ("demo-2", True), ("there", False), ("demo-3", True),
        ("demo-4", True), BadInput, LimitReached, ("demo-5", True), LimitReached,
    ]  # fmt: skip
    assert found[4][0] == first
    studies = [each[0] for each in found if isinstance(each, tuple) and each[1]]
    assert [study.id for study in store.queue.queued()] == [first.id, *(study.id for study in studies)]
    assert all(store.table(study.id, "layers") == TABLES["layers"] for study in studies)
    assert store.queue.submit_all([submission("x"), submission("x")])[0][1]


def test_one_that_cannot_be_stored_takes_no_other_with_it(store):
    broken = Prepared(OBJECTIVES, {"layers": float("nan")}, {})
    found = store.queue.submit_all([submission("a"), submission("b", prepared=broken), submission("c", name="other")])
    assert [each[0].name for each in found[::2]] == ["demo", "other"]
    assert isinstance(found[1], StoreError)
    assert {study.name for study in store.queue.queued()} == {"demo", "other"}


@pytest.mark.parametrize("wanted", [("a", "a", "a-2"), ("a-2", "a", "a"), ("a", "a-2", "a", "a-2")])
def test_names_that_are_given_at_once_are_free(store, wanted):
    submit(store, name="a-2-2")
    found = store.queue.submit_all([submission(name=name) for name in wanted])
    names = [study.name for study, _ in found]
    assert len(set(names)) == len(names) == len(wanted)
    assert all(name.startswith(stem) for name, stem in zip(names, wanted, strict=True))


def test_a_submission_that_fails_leaves_nothing(store):
    broken = Prepared(OBJECTIVES, {"layers": float("nan")}, {})
    with pytest.raises(Exception, match=r"(?i)nan|JSON"):
        store.queue.submit("ann", "k", "f", spec(), broken)
    assert store.studies() == []
    assert submit(store, "k")[1]


# What waits


def test_what_waits_is_in_the_order_of_priority_and_then_of_submission(store):
    ids = [submit(store, name=f"s{i}", priority=priority)[0].id for i, priority in enumerate([0, 1, 0, 1])]
    assert [study.id for study in store.queue.queued()] == [ids[1], ids[3], ids[0], ids[2]]
    assert store.queue.lengths() == {
        "studies_queued": 4, "studies_running": 0, "exports_queued": 0, "exports_running": 0,
    }  # fmt: skip


def test_a_queued_study_is_cancelled_at_once_and_can_be_queued_again(store):
    study, _ = submit(store)
    ended = store.queue.cancel(study.id)
    assert (ended.state, ended.request) == ("cancelled", "cancel")
    assert store.queue.queued() == []
    with pytest.raises(Conflict, match=r"^study 'demo' is cancelled and cannot be cancelled$"):
        store.queue.cancel(study.id)
    again = store.queue.enqueue(study.id)
    assert (again.state, again.request, again.finished_at) == ("queued", None, None)


def test_a_running_study_is_asked_to_end_and_one_that_nobody_runs_has_ended(store):
    study, _ = submit(store)
    epoch = store.queue.acquire(study.id, holders.holder(), 60)
    store.set_state(study.id, "running")
    assert store.queue.cancel(study.id).state == "running"
    assert store.queue.request(study.id) == "cancel"
    store.queue.ask(study.id, "yield")
    assert store.queue.request(study.id) == "cancel"
    store.queue.release(study.id, epoch)
    assert store.queue.cancel(study.id).state == "cancelled"


def test_a_study_that_yields_waits_again_in_its_old_place(store):
    first, second = (submit(store, name=name)[0] for name in ("a", "b"))
    store.set_state(first.id, "running")
    store.queue.ask(first.id, "yield")
    assert [study.id for study, _ in store.queue.running()] == [first.id]
    store.queue.settle(first.id, "queued")
    assert store.queue.request(first.id) is None
    assert [study.id for study in store.queue.queued()] == [first.id, second.id]
    store.queue.ask(first.id, "yield")  # too late: nobody runs it
    assert store.queue.request(first.id) is None


def test_a_finished_study_is_queued_for_more_trials_or_for_a_job_only(store):
    study, _ = submit(store)
    with pytest.raises(Conflict, match=r"is queued already"):
        store.queue.enqueue(study.id)
    with pytest.raises(Conflict, match=r"is queued already"):
        store.queue.enqueue(study.id, job={"kind": "refine"})
    for number in range(3):
        add_trial(store, study.id, number, 2 + number)
    store.queue.settle(study.id, "interrupted")
    with pytest.raises(Conflict, match=r"is interrupted and cannot be added to; resume it first"):
        store.queue.enqueue(study.id, job={"kind": "refine"})
    store.queue.settle(study.id, "finished")
    with pytest.raises(Conflict, match=r"is finished; give it more trials"):
        store.queue.enqueue(study.id)
    with pytest.raises(BadInput, match=r"trials must be more than the 3 that study 'demo' has had \(got 3\)"):
        store.queue.enqueue(study.id, trials=3)
    assert store.study(study.id).state == "finished"
    assert store.queue.enqueue(study.id, trials=4).spec["budget"]["trials"] == 4
    store.queue.settle(study.id, "finished")
    refined = store.queue.enqueue(study.id, job={"kind": "refine", "n": 2})
    assert (refined.state, store.table(study.id, "job")) == ("queued", {"kind": "refine", "n": 2})
    # What was finished is so again.
    assert store.queue.cancel(study.id).state == "finished"
    with pytest.raises(LimitReached):
        store.queue.enqueue(study.id, trials=5, limit=0)


# Leases


@pytest.fixture
def later(monkeypatch):
    """The clock that leases are held against goes on by as many seconds as it is told."""
    clock, ahead = leases.lease_clock, [0.0]

    def shifted(connection):
        return clock(connection) + timedelta(seconds=sum(ahead))

    monkeypatch.setattr(leases, "lease_clock", shifted)
    monkeypatch.setattr(queue, "lease_clock", shifted)
    return ahead.append


def test_one_holder_at_a_time_and_a_renewed_lease_does_not_end(store, later):
    study, _ = submit(store)
    assert store.queue.lease(study.id) is None
    epoch = store.queue.acquire(study.id, "elsewhere:1:0:0", 600)
    assert epoch == 1
    assert store.queue.acquire(study.id, "elsewhere:2:0:0", 600) is None
    for _ in range(4):
        later(300)
        assert store.queue.acquire(study.id, "elsewhere:2:0:0", 600) is None
        assert store.queue.renew(study.id, epoch, 600)
    lease = store.queue.lease(study.id)
    assert (lease.holder, lease.live) == ("elsewhere:1:0:0", True)
    later(601)
    assert not store.queue.lease(study.id).live
    assert store.queue.renew(study.id, epoch, 600)  # late, but nobody was waiting
    assert store.queue.lease(study.id).live
    later(601)
    assert store.queue.acquire(study.id, "elsewhere:2:0:0", 600) == 2
    assert not store.queue.renew(study.id, epoch, 600)
    store.queue.release(study.id, epoch)  # of the former holder: nothing happens
    assert store.queue.lease(study.id).live
    store.queue.release(study.id, 2)
    assert not store.queue.lease(study.id).live
    assert not store.queue.renew(study.id, 2, 600)
    assert store.queue.acquire(study.id, "elsewhere:1:0:0", 600) == 3


def test_of_many_who_want_a_lease_one_gets_it(store):
    study, _ = submit(store)
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda i: store.queue.acquire(study.id, f"elsewhere:{i}:0:0", 60), range(20)))
    assert sorted(found, key=str) == [1] + [None] * 19
    with pytest.raises(NotFound):
        store.queue.acquire(999, "elsewhere:1:0:0", 60)


def test_a_lease_that_could_not_be_let_go_does_not_keep_its_own_process_out(store, monkeypatch):
    """As on a disk that is full: who frees it and goes on in the same notebook is not told that he runs the study."""
    study = submit(store)[0]
    with monkeypatch.context() as patch, holding(store, study.id) as hold:
        patch.setattr(type(store.queue), "release", full)
    assert store.queue.lease(study.id).live
    assert store.queue.acquire(study.id, "elsewhere:1:0:0", 600) is None
    with holding(store, study.id) as again:
        assert again.epoch == hold.epoch + 1
        with pytest.raises(StudyBusy), holding(store, study.id):
            pass


def full(*_):
    raise StoreError("the disk is full")


def test_a_dead_process_of_this_machine_holds_nothing(store):
    study, _ = submit(store)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = holders.holder(process.pid)
        assert store.queue.acquire(study.id, name, 600) == 1
        assert store.queue.lease(study.id).live
        process.kill()
        while not holders.is_dead(name):  # also while nobody has asked for its exit status
            time.sleep(0.01)
    assert store.queue.acquire(study.id, holders.holder(), 60) == 2


def test_what_a_former_holder_writes_is_refused(store, url, later):
    study, _ = submit(store)
    epoch = store.queue.acquire(study.id, "elsewhere:1:0:0", 600)
    mine = store.under(study.id, epoch)
    mine.set_state(study.id, "running")
    add_trial(mine, study.id, 0)
    running = mine.start_trial(study.id, 1, Assignment({"a": parse_scheme("rtn-int2-g64")}), "sampler")
    later(601)
    with Store.open(url) as other:
        taken = other.queue.acquire(study.id, "elsewhere:2:0:0", 600)
        changes = other.study(study.id).changes
        found = [Measurement(name, 1.0, unit, "measured", "search") for name, unit, _ in OBJECTIVES]
        for write in (
            lambda: mine.finish_trial(running.id, 1, found, {}, 1.0, "w"),
            lambda: mine.set_state(study.id, "finished"),
            lambda: mine.queue.settle(study.id, "finished"),
            lambda: mine.put_table(study.id, "costs", {}),
            lambda: add_trial(mine, study.id, 2, 3),
        ):
            with pytest.raises(LeaseLost, match="this one stops and writes nothing more"):
                write()
        assert other.study(study.id).changes == changes
        assert [trial.state for trial in other.trials(study.id)] == ["complete", "running"]
        assert other.under(study.id, taken).finish_trial(running.id, 1, found, {}, 1.0, "w")


# Workers


def test_workers_are_seen_until_they_end_or_are_silent(store, monkeypatch):
    study, _ = submit(store)
    one = WorkerRecord("here:1", "here", "cpu", "busy", study.id, trial=3, memory_bytes=5 * 10**9)
    two = WorkerRecord("here:2", "here", "cpu", "idle")
    store.queue.beat([one, two])
    (first, second) = store.queue.workers()
    assert (first.id, first.study, first.trial, first.memory_bytes) == ("here:1", "demo", 3, 5 * 10**9)
    assert (second.study_id, second.study) == (None, None)
    assert first.to_json()["seen_at"] == first.seen_at.isoformat()
    store.queue.forget_workers(["here:2"])
    assert [worker.id for worker in store.queue.workers()] == ["here:1"]
    monkeypatch.setattr("autoq.store.clock.STALE_SECONDS", 0.1)
    time.sleep(0.2)
    assert store.queue.workers() == []
    store.queue.beat([two])
    monkeypatch.setattr("autoq.store.clock.STALE_SECONDS", 60.0)
    assert [worker.id for worker in store.queue.workers()] == ["here:2"]


@pytest.mark.parametrize(("job", "ended"), [(None, "cancelled"), ({"kind": "refine"}, "finished")])
def test_who_queues_a_study_again_does_not_undo_its_cancellation(store, job, ended):
    """Its process crashed or gave way, and the cancellation comes before that is recorded."""
    study, _ = submit(store)
    if job:
        store.set_state(study.id, "finished")
        store.queue.enqueue(study.id, job=job)
    epoch = store.queue.acquire(study.id, holders.holder(), 60)
    store.under(study.id, epoch).queue.settle(study.id, "running")
    assert store.queue.cancel(study.id).state == "running"
    store.under(study.id, epoch).queue.settle(study.id, "queued", "killed by signal 11; going on, 1 of 3")
    found = store.study(study.id)
    assert (found.state, found.message, found.request) == (ended, None, None)


# Exports


def test_an_export_is_queued_once_and_goes_through_its_states(store):
    study, _ = submit(store)
    add_trial(store, study.id, 0)
    add_trial(store, study.id, 1, 2)
    export = store.queue.add_export(study.id, 0, None, "ann")
    assert (export.state, export.target, export.trial, export.study) == ("queued", "torch-cpu", 0, "demo")
    assert store.queue.add_export(study.id, 0, "torch-cpu", "bob").id == export.id
    other = store.queue.add_export(study.id, 1, "vllm", "ann")
    with pytest.raises(LimitReached, match="ann has 2 exports queued or running; 2 are allowed"):
        store.queue.add_export(study.id, 1, None, "ann", limit=2)
    assert store.queue.set_export(export.id, "running", ["queued"], progress={"stage": "load", "holder": "h"})
    assert not store.queue.set_export(export.id, "running", ["queued"])
    found = store.queue.export(export.id)
    assert found.started_at is not None
    assert found.to_json()["progress"] == {"stage": "load"}
    assert store.queue.lengths()["exports_running"] == 1
    assert store.queue.set_export(export.id, "finished", ["running"], result={"lines": []})
    assert [each.id for each in store.queue.exports(study.id, ["finished"])] == [export.id]
    assert [each.id for each in store.queue.exports()] == [export.id, other.id]
    assert store.queue.add_export(study.id, 0).id == export.id
    assert store.queue.set_export(export.id, "removed", ["finished"])
    assert store.queue.add_export(study.id, 0).id not in (export.id, other.id)


def test_exports_of_what_is_not_there_or_not_complete_are_refused(store):
    study, _ = submit(store)
    store.start_trial(study.id, 0, Assignment({"a": parse_scheme("rtn-int2-g64")}), "sampler")
    with pytest.raises(BadInput, match=r"trial 0 of 'demo' is running; only a complete one can be exported"):
        store.queue.add_export(study.id, 0)
    for number in (7, -1, 2**40):
        with pytest.raises(NotFound, match="has no trial"):
            store.queue.add_export(study.id, number)
    with pytest.raises(NotFound):
        store.queue.add_export(99, 0)
    with pytest.raises(NotFound, match="no export 5"):
        store.queue.export(5)


def test_the_address_opens_the_same_database_and_is_not_what_is_shown(store):
    study, _ = submit(store)
    with Store.open(store.address, create=False) as other:
        assert other.study(study.id) == study
        assert other.url == store.url
    assert ("s3cret" in store.address.replace("%2F", "/")) == ("postgresql" in store.address)
    assert "s3cret" not in store.url
