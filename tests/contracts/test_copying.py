"""Databases that are copied: whole, in part, from one kind to the other, under a writer, and damaged."""

from __future__ import annotations

import hashlib
import shutil
import threading

import pytest
import sqlalchemy as sa

from autoq.errors import BadInput, NotFound, StoreError
from autoq.store import Descent, Store, models
from autoq.store.copying import copy


def everything(store, *names):
    """All that is stored of studies, by their names."""
    found = {}
    for study in [store.study(name) for name in names]:
        trials = store.trials(study.id, with_assignments=True)
        values = [
            (t.number, key, store.token_values(study.id, t.number, *key)) for t in trials for key in t.measurements
        ]
        with store._database.reading() as connection:
            t = models.tables.c
            tables = connection.execute(sa.select(t.name, t.body).where(t.study_id == study.id).order_by(t.name)).all()
        found[study.name] = (
            study.to_json() | {"id": 0},
            study.plan,
            dict(study.sampler_attrs),
            [(t.to_json(), t.attempt, t.changed, dict(t.sampler_attrs)) for t in trials],
            [t.number for t in store.frontier(study.id)],
            [(number, key, None if array is None else array.tobytes()) for number, key, array in values],
            [tuple(row) for row in tables],
            [remark.to_json() for remark in store.remarks.of(study.id)],
        )
    return found


@pytest.fixture(scope="module")
def sources(server, believable, tmp_path_factory):
    """A database of each kind with two studies: kind -> store. Nobody writes to them."""
    urls = {"sqlite": str(tmp_path_factory.mktemp("source") / "autoq.db"), "postgresql": server.fresh()}
    with Store.open(urls["sqlite"]) as lite, Store.open(urls["postgresql"]) as post:
        for store in (lite, post):
            for seed, name in enumerate(("one", "two")):
                writer = believable.Writer.new(store, name, trials=9, seed=seed)
                writer.baselines()
                writer.propose(6)
                writer.failure()
                writer.report()
            study = store.study("one")
            body = b"layers"
            descent = Descent(3, {"steps": 2, "losses": [1.5]}, {hashlib.sha256(body).hexdigest()[:40]: body})
            store.start_trial(study.id, len(store.trials(study.id)), writer.proposal(5.0), "recover", descent=descent)
            store.put_table(study.id, "costs", {"layers": [1, 2.5]})
            store.remarks.put(study.id, 3, "look at this", ["good", "small"], "ann")
            store.put_costs("k", "cpu", {"a": 1.5})
        yield {"sqlite": lite, "postgresql": post}


@pytest.fixture
def filled(sources, tmp_path):
    """The SQLite one, to be written to."""
    sources["sqlite"]._database.close()  # the log goes into the file
    path = shutil.copy(sources["sqlite"].url, tmp_path / "filled.db")
    with Store.open(str(path)) as store:
        yield store


@pytest.fixture(params=["sqlite-sqlite", "sqlite-postgresql", "postgresql-sqlite"])
def pair(request, sources, tmp_path):
    """A source, and an empty target."""
    source, _, kind = request.param.partition("-")
    url = str(tmp_path / "copy.db") if kind == "sqlite" else request.getfixturevalue("server").fresh()
    with Store.open(url) as target:
        yield sources[source], target


@pytest.fixture
def target(tmp_path):
    """An empty database."""
    with Store.open(str(tmp_path / "copy.db")) as store:
        yield store


def test_a_copy_has_everything_and_goes_on(pair, believable):
    filled, target = pair
    secret = filled.accounts.create("laptop", "ann", "viewer", None)[0]
    done = copy(filled, target)
    assert (done.studies, done.left_out) == (["one", "two"], [])
    assert everything(target, "one", "two") == everything(filled, "one", "two")
    assert target.costs("k") == {"a": 1.5}
    assert target.accounts.find(secret).user == "ann"
    study = target.study("two")
    assert study.id == filled.study("two").id
    # New rows get ids that no copied one has, and the frontier takes what comes.
    writer = believable.Writer(target, study, 9)
    before = len(target.trials(study.id))
    writer.propose(5)
    assert len(target.trials(study.id)) == before + 5
    assert [t.number for t in target.frontier(study.id)] == target.recompute_frontier(study.id)
    believable.Writer.new(target, "three", trials=2).propose(2)


def test_a_study_joins_others(pair, believable):
    filled, target = pair
    believable.Writer.new(target, "two", trials=3).propose(3)
    own = everything(target, "two")
    done = copy(filled, target, ["two"])
    assert done.studies == ["two-2"]
    assert everything(target, "two") == own
    (wanted,), (found,) = everything(filled, "two").values(), everything(target, "two-2").values()
    assert found[0] == wanted[0] | {"study": "two-2", "state": "interrupted"}  # nobody runs the copy
    assert [trial | {"study": "two"} for trial, *_ in found[3]] == [trial for trial, *_ in wanted[3]]
    assert found[4:] == wanted[4:]
    assert copy(target, None).left_out == []


def test_what_cannot_be_copied_is_refused_and_nothing_is_written(filled, target, believable):
    with pytest.raises(NotFound, match="no study 'three'"):
        copy(filled, target, ["three"])
    with pytest.raises(BadInput, match="cannot be copied into itself"):
        copy(filled, filled)
    believable.Writer.new(target, "own", trials=2).propose(2)
    with pytest.raises(BadInput, match=r"has studies already; name those that shall join them$"):
        copy(filled, target)
    with filled._database.writing() as connection:
        best = "SELECT trial_id FROM frontier WHERE study_id = 2"
        connection.exec_driver_sql(f"UPDATE measurements SET value = value * 1.001 WHERE trial_id IN ({best})")
    with pytest.raises(StoreError, match=r"^trial \d+ of study 'two' is damaged: [^\n]*autoq copy NEW --rescue$"):
        copy(filled, target, ["two"])
    assert [study.name for study in target.studies()] == ["own"]
    assert copy(filled, target, ["one"]).studies == ["one"]


def test_a_rescue_leaves_out_what_does_not_hold(filled, target):
    *_, best = filled.frontier(2)
    study = filled.study("two")
    with filled._database.writing() as connection:
        connection.exec_driver_sql(f"UPDATE measurements SET value = value / 2 WHERE trial_id = {best.id}")
        connection.exec_driver_sql("UPDATE tables SET body = REPLACE(body, '1', '7') WHERE study_id = 1")
        connection.exec_driver_sql("DELETE FROM frontier WHERE study_id = 1")
    with pytest.raises(StoreError, match="damaged"):
        copy(filled, target)
    done = copy(filled, target, rescue=True)
    assert done.studies == ["one", "two"]
    said = "what is stored of it is not what was measured; it waits to be measured again"
    assert f"trial {best.number} of study 'two': {said}" in done.left_out
    assert any(line.startswith("row 1, ") for line in done.left_out)
    assert copy(target, None).left_out == []
    again = target.trial(study.id, best.number)
    assert (again.state, again.attempt, again.hash, again.measurements) == ("running", best.attempt + 1, best.hash, {})
    others = [trial.to_json() for trial in target.trials(study.id) if trial.number != best.number]
    for trial in others:
        assert trial | {"on_frontier": 0} == filled.trial(study.id, trial["number"], False).to_json() | {
            "on_frontier": 0
        }
    assert (target.study("two").state, target.study("one").state) == ("interrupted", filled.study("one").state)
    for each in target.studies():
        assert [trial.number for trial in target.frontier(each.id)] == target.recompute_frontier(each.id)


def test_a_copy_is_of_one_moment_however_much_is_written_meanwhile(filled, tmp_path, believable):
    study, ends = filled.study("one"), threading.Event()
    with Store.open(filled.address) as own:
        writer = believable.Writer(own, study, 9)

        def write():
            while not ends.is_set():
                writer.propose(1)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for turn in range(3):
                with Store.open(str(tmp_path / f"{turn}.db")) as target:
                    copy(filled, target)
                    assert copy(target, None).left_out == []
                    numbers = [trial.number for trial in target.trials(study.id)]
                    assert numbers == list(range(len(numbers)))
                    assert target.recompute_frontier(study.id) == [t.number for t in target.frontier(study.id)]
        finally:
            ends.set()
            thread.join()


def test_rows_of_a_torn_page_are_found_one_by_one(tmp_path, believable):
    """A page of the table of trials is zeros: its rows are gone, all others are rescued."""
    path = tmp_path / "torn.db"
    with Store.open(str(path)) as store:
        believable.crowd(store, "crowd", 200)
        whole = everything(store, "crowd")["crowd"]
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    rows = content.find(b"sampler", len(content) // 2)
    page = rows // size * size
    content[page : page + size] = bytes(size)
    path.write_bytes(content)
    with Store.open(str(path)) as store, Store.open(str(tmp_path / "new.db")) as new:
        with pytest.raises(StoreError, match="is damaged"):
            copy(store, None)
        done = copy(store, new, rescue=True)
        assert done.left_out
        assert copy(new, None).left_out == []
        kept = everything(new, "crowd")["crowd"]
        assert [trial["number"] for trial, *_ in kept[3]] == list(range(len(kept[3])))
        known = {trial["number"]: (trial | {"on_frontier": None}, *more) for trial, *more in whole[3]}
        held = [each for each in kept[3] if (each[0]["error"] or {}).get("type") != "Lost"]
        assert 50 < len(held) < len(kept[3])
        for trial, *more in held:
            assert (trial | {"on_frontier": None}, *more) == known[trial["number"]]
