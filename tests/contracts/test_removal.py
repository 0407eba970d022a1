"""Studies that are removed, on every database: all that is theirs goes, nothing else, and no number comes again."""

from __future__ import annotations

import random
import threading

import pytest
import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import Conflict, NotFound
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Prepared, Store, WorkerRecord, holders
from autoq.store import models as m
from autoq.store.copying import copy
from autoq.store.feed import Whose
from autoq.store.records import Descent

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
DIGESTS = ["0123456789" * 4, "abcdef0123" * 4]


def made(store, name, owner=None):
    spec = build_spec({"model": {"id": "tiny"}, "name": name})
    study = store.queue.submit(owner, None, name, spec, Prepared(OBJECTIVES, {"layers": {"a": {}}}))[0]
    store.set_state(study.id, "finished")
    return study


def add(store, study, number, bits=4, trained=None, descent=None):
    assignment = Assignment({"a": parse_scheme(f"rtn-int{bits}-g64")}, trained={} if trained is None else trained)
    origin = "recover" if descent else "sampler"
    trial = store.start_trial(study.id, number, assignment, origin, descent=descent)
    found = [Measurement(name, float(bits), unit, "measured", "search") for name, unit, _ in OBJECTIVES]
    assert store.finish_trial(trial.id, 1, found, {}, 1.0, "w")
    return assignment


def rows(store, study_id):
    """How many rows the tables have that are a study's own."""
    own = sa.select(m.trials.c.id).where(m.trials.c.study_id == study_id)
    with store._database.reading() as connection:

        def count(table, where):
            return connection.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one()

        tables = {table.name: table for table in m.metadata.tables.values()}
        found = {name: count(t, t.c.study_id == study_id) for name, t in tables.items() if "study_id" in t.c}
        found |= {name: count(t, t.c.trial_id.in_(own)) for name, t in tables.items() if "trial_id" in t.c}
        return found


def contents(store, table):
    with store._database.reading() as connection:
        return {row[0] for row in connection.execute(sa.select(table))}


def test_a_study_goes_with_all_that_is_its_own_and_nothing_else_does(store):
    gone, stays = made(store, "gone", "ada"), made(store, "stays", "bob")
    shared, own = add(store, gone, 0, 4), add(store, gone, 1, 3)
    assert add(store, stays, 0, 4).hash == shared.hash
    layers = {digest: digest.encode() for digest in DIGESTS}
    add(store, gone, 2, 2, {"a": DIGESTS[0]}, Descent(0, {}, {DIGESTS[0]: layers[DIGESTS[0]]}))
    add(store, gone, 3, 5, {"a": DIGESTS[1]}, Descent(0, {}, {DIGESTS[1]: layers[DIGESTS[1]]}))
    add(store, stays, 1, 5, {"a": DIGESTS[1]}, Descent(0, {}, {DIGESTS[1]: layers[DIGESTS[1]]}))
    store.remarks.put(gone.id, 0, "a note", ["tag"], "ada")
    store.queue.set_export(store.queue.add_export(gone.id, 0).id, "finished", ["queued"])
    store.queue.beat([WorkerRecord("here:1", "here", "cpu", "idle", gone.id)])
    assert all(rows(store, gone.id)[name] for name in ("trials", "measurements", "frontier", "remarks", "tables"))
    kept, before = rows(store, stays.id), store.trials(stays.id)

    removed = store.queue.remove(gone.id, "ada")

    assert (removed.id, removed.name, removed.owner, removed.trials, removed.user) == (gone.id, "gone", "ada", 4, "ada")
    assert store.queue.removals() == [removed]
    assert set(rows(store, gone.id).values()) == {0}
    assert rows(store, stays.id) == kept
    assert store.trials(stays.id) == before
    assert shared.hash in contents(store, m.assignments)
    assert own.hash not in contents(store, m.assignments)
    assert contents(store, m.trained_layers) == {DIGESTS[1]}
    for name in ("gone", gone.id):
        with pytest.raises(NotFound):
            store.study(name)
    with pytest.raises(NotFound):
        store.queue.remove(gone.id)


def test_what_is_queued_or_at_work_is_not_removed(store):
    study = made(store, "demo")
    add(store, study, 0)
    epoch = store.queue.acquire(study.id, holders.holder(), 60)
    with pytest.raises(Conflict, match="study 'demo' is at work; cancel it, and remove it once it has ended"):
        store.queue.remove(study.id)
    store.queue.release(study.id, epoch)
    export = store.queue.add_export(study.id, 0)
    before = store.study(study.id)
    with pytest.raises(Conflict, match="an export of study 'demo' is being written"):
        store.queue.remove(study.id)
    assert store.study(study.id) == before, "what is refused counts as no change"
    store.queue.set_export(export.id, "failed", ["queued"])
    store.queue.enqueue(study.id, 200)
    with pytest.raises(Conflict, match="study 'demo' is queued; cancel it first"):
        store.queue.remove(study.id)
    store.queue.cancel(study.id)
    assert store.queue.remove(study.id).trials == 1
    assert store.studies() == []


def test_no_number_comes_again_but_the_name_does(store):
    ada = Whose(False, "ada")
    first = made(store, "demo", "ada")
    made(store, "other", "bob")
    stamps = [store.feed.total(ada)]
    seen = {study.id for study in store.studies()}
    for _ in range(3):
        newest = store.study("demo")
        store.queue.remove(newest.id)
        stamps.append(store.feed.total(ada))
        again = made(store, "demo", "ada")
        assert again.name == "demo"
        assert again.id not in seen, "who follows the old one must not be shown the new one"
        seen.add(again.id)
        stamps.append(store.feed.total(ada))
    changes = [total for _, total in stamps]
    assert changes == sorted(set(changes)), "every look at the list tells apart what is before and after"
    with pytest.raises(NotFound):
        store.feed.chunk(first.id, 0, 10)


def test_a_key_that_a_removed_study_was_submitted_under_makes_a_new_one(store):
    spec = build_spec({"model": {"id": "tiny"}, "name": "demo"})
    first, _ = store.queue.submit("ada", "key", "f", spec, Prepared(OBJECTIVES, {}))
    store.queue.cancel(first.id)
    store.queue.remove(first.id)
    second, fresh = store.queue.submit("ada", "key", "f", spec, Prepared(OBJECTIVES, {}))
    assert fresh
    assert second.id != first.id


def test_removals_take_nothing_from_those_who_store_the_same_at_that_moment(url):
    """Two processes' worth of connections store trials of a handful of assignments, while studies of the same go."""
    problems = []

    def work(seed):
        drawn = random.Random(seed)
        try:
            with Store.open(url) as mine:
                study = made(mine, f"stays-{seed}")
                for number in range(40):
                    add(mine, study, number, drawn.randrange(2, 9))
        except BaseException as problem:
            problems.append(problem)

    with Store.open(url) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                study = made(store, "goes")
                for number in range(4):
                    add(store, study, number, 2 + number)
                store.queue.remove(study.id)
        finally:
            for thread in threads:
                thread.join()
        assert problems == []
        names = [study.name for study in store.studies()]
        assert sorted(names) == ["stays-0", "stays-1"]
        for name in names:
            trials = store.trials(store.study(name).id)
            assert len(trials) == 40
            assert all(store.trial_by_id(trial.id).assignment is not None for trial in trials)
        assert {t.hash for name in names for t in store.trials(store.study(name).id)} == contents(store, m.assignments)


def test_a_copy_of_the_database_does_not_give_a_number_again_either(store, tmp_path):
    made(store, "stays")
    gone = store.queue.remove(made(store, "goes").id, "ada")
    with Store.open(f"sqlite:///{tmp_path}/copy.db") as other:
        copy(store, other)
        assert other.queue.removals() == [gone]
        store.queue.remove(store.study("stays").id)
        with store._database.writing() as connection:
            connection.execute(sa.delete(m.removals))
        copy(other, store)  # and back, from SQLite
        for each in (other, store):
            assert made(each, "goes").id > gone.id
