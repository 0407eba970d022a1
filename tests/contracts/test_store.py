"""What every database behind the store must do: SQLite and PostgreSQL."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.assignment import Assignment
from autoq.errors import NotFinite, NotFound, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Descent, Store, TrialRecord
from autoq.store.models import VERSION_TABLE, metadata

SPEC = build_spec({"model": {"id": "tiny"}, "name": "demo"})
KL = ("kl_nats_per_token", "nats/token", "minimize")
SIZE = ("size_bytes", "bytes", "minimize")
ACCURACY = ("accuracy", "fraction", "maximize")
SCHEMES = [parse_scheme(f"rtn-int{bits}-g64") for bits in range(2, 9)]
PASSWORD = "s3cret/word"


def assignment(index: int, layers: int = 4) -> Assignment:
    """A different one for every index below 7**layers."""
    return Assignment({f"layer.{place}": SCHEMES[index // 7**place % 7] for place in range(layers)})


def searched(objectives, values, part="search", **more) -> list[Measurement]:
    return [
        Measurement(name, value, unit, "measured", part, **more)
        for (name, unit, _), value in zip(objectives, values, strict=True)
    ]


def study_with(store: Store, objectives=(KL, SIZE)):
    return store.create_study(SPEC, objectives)


def finished(store: Store, study, number: int, values, violations=None) -> TrialRecord:
    trial = store.start_trial(study.id, number, assignment(number), "sampler")
    assert store.finish_trial(trial.id, 1, searched(study.objectives, values), violations or {}, 1.0, "local")
    return store.trial(study.id, number)


def numbers(trials) -> list[int]:
    return [trial.number for trial in trials]


def test_the_migrations_build_the_models(store):
    with store._database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_opening_again_keeps_everything(url):
    with Store.open(url) as store:
        assert store.studies() == []
        study = study_with(store)
        trial = finished(store, study, 0, (1.0, 2.0))
    with Store.open(url, create=False) as store:
        assert store.study("demo").created_at == study.created_at
        assert store.trial(study.id, 0) == trial


def test_a_taken_name_gets_the_first_free_number(store):
    assert [study_with(store).name for _ in range(3)] == ["demo", "demo-2", "demo-3"]
    other = build_spec({"model": {"id": "tiny"}, "name": "dem_"})
    assert store.create_study(other, [KL]).name == "dem_"


def test_one_name_for_many_at_once(url, store):
    def create(_):
        with Store.open(url) as own:
            return [study_with(own).name for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        names = [name for some in pool.map(create, range(4)) for name in some]
    assert sorted(names) == sorted(["demo", *(f"demo-{count}" for count in range(2, 17))])


def test_a_study_is_found_by_name_and_by_id(store):
    study = study_with(store)
    digits = store.create_study(build_spec({"model": {"id": "tiny"}, "name": str(study.id)}), [KL])
    assert store.study("demo") == store.study(study.id) == study
    assert store.study(str(digits.id)).id == digits.id
    assert store.study(str(study.id)) == digits, "a name goes before an id"
    assert study.study_spec() == SPEC
    assert study.objectives == (KL, SIZE)
    assert study.directions == ("minimize", "minimize")


def test_an_unknown_study_or_trial_is_named_with_what_there_is(store):
    with pytest.raises(NotFound, match=r"^no study 'demo'; the database has none$"):
        store.study("demo")
    study = study_with(store)
    with pytest.raises(NotFound, match=r"^no study 'dmeo'; did you mean 'demo'\? there are demo$"):
        store.study("dmeo")
    with pytest.raises(NotFound, match=r"^study 'demo' has no trial 3; it has none$"):
        store.trial(study.id, 3)
    finished(store, study, 0, (1.0, 1.0))
    finished(store, study, 1, (1.0, 1.0))
    with pytest.raises(NotFound, match=rf"^study 'demo' has no trial {10**30}; its trials are 0 to 1$"):
        store.trial(study.id, 10**30)
    with pytest.raises(NotFound, match=r"^study 'demo' has no trial 3; its trials are 0 to 1$"):
        store.trial(study.id, 3)
    for ask in (store.trials, store.frontier, store.study, store.recompute_frontier):
        with pytest.raises(NotFound, match=r"^no study with id 99$"):
            ask(99)
    for write in (
        lambda: store.set_state(99, "running"),
        lambda: store.put_table(99, "costs", {}),
        lambda: store.start_trial(99, 0, assignment(0), "sampler"),
    ):
        with pytest.raises(NotFound, match=r"^no study with id 99$"):
            write()
    for write in (
        lambda: store.finish_trial(99, 1, [], {}, 0.0, ""),
        lambda: store.fail_trial(99, 1, "", "", "", 0.0, ""),
        lambda: store.retry_trial(99),
        lambda: store.trial_by_id(99),
    ):
        with pytest.raises(NotFound, match=r"^no trial with id 99$"):
            write()
    with pytest.raises(NotFound, match=r"^no assignment with hash 'beef'$"):
        store.assignment("beef")


def test_the_states_of_a_study_and_their_times(store):
    study = study_with(store)
    assert (study.state, study.started_at, study.finished_at) == ("created", None, None)
    assert abs(datetime.now(UTC) - study.created_at) < timedelta(minutes=1)
    assert study.created_at.tzinfo is UTC
    store.set_state(study.id, "running")
    started = store.study(study.id).started_at
    assert started >= study.created_at
    store.set_state(study.id, "interrupted", "Ctrl-C")
    ended = store.study(study.id)
    assert (ended.state, ended.message) == ("interrupted", "Ctrl-C")
    assert ended.finished_at >= started
    store.set_state(study.id, "running")
    resumed = store.study(study.id)
    assert (resumed.started_at, resumed.finished_at, resumed.message) == (started, None, None)


def test_plan_tables_and_sampler_state_come_back_as_they_went(store):
    study = study_with(store)
    assert (study.plan, dict(study.sampler_attrs), store.table(study.id, "costs")) == (None, {}, None)
    plan = {"seeds": [{"a": "keep"}], "facts": {"größe": 1.5, "none": None}}
    store.save_plan(study.id, plan)
    store.save_sampler_attrs(study.id, {"best": float("inf"), "ids": [1, 2]})
    store.put_table(study.id, "costs", [1])
    store.put_table(study.id, "costs", {"layer": {"rtn-int4-g64": 0.1}})
    again = store.study(study.id)
    assert again.plan == plan
    assert again.sampler_attrs == {"best": float("inf"), "ids": [1, 2]}
    assert store.table(study.id, "costs") == {"layer": {"rtn-int4-g64": 0.1}}
    with pytest.raises(StoreError, match=r"^[^\n]*not JSON compliant[^\n]*$"):
        store.put_table(study.id, "costs", {"layer": float("nan")})
    assert store.table(study.id, "costs") == {"layer": {"rtn-int4-g64": 0.1}}


def test_a_trial_from_start_to_report(store):
    study = study_with(store)
    trial = store.start_trial(study.id, 7, assignment(3), "baseline", "uniform-4", {"generation": 1})
    assert (trial.number, trial.state, trial.attempt, trial.feasible) == (7, "running", 1, None)
    assert trial.assignment == assignment(3)
    assert store.running_trials(study.id) == [trial]

    exact = Measurement("size_bytes", 123456789.0, "bytes", "computed", "search")
    loss = Measurement(
        "kl_nats_per_token", 0.1 + 0.2, "nats/token", "measured", "search", 1e-3, 2048, "cpu", {"threads": 2}
    )
    assert store.finish_trial(trial.id, 1, [loss, exact], {"size_bytes": -1.0}, 2.5, "worker-1", {"generation": 2})
    done = store.trial(study.id, 7)
    assert done.measurements == {("kl_nats_per_token", "search"): loss, ("size_bytes", "search"): exact}
    assert done.values(["size_bytes", "kl_nats_per_token"]) == (123456789.0, 0.1 + 0.2)
    assert done.sampler_attrs == {"generation": 2}
    assert store.trial_by_id(done.id) == done
    with pytest.raises(KeyError):
        done.values(["size_bytes"], part="report")
    assert done.to_json() == {
        "study": "demo",
        "number": 7,
        "state": "complete",
        "origin": "baseline",
        "baseline": "uniform-4",
        "feasible": True,
        "on_frontier": True,
        "hash": assignment(3).hash,
        "duplicate_of": None,
        "parent": None,
        "derivation": None,
        "assignment": assignment(3).to_dict(),
        "measurements": {"kl_nats_per_token": loss.to_json(), "size_bytes": exact.to_json()},
        "search": {},
        "violations": {"size_bytes": -1.0},
        "error": None,
        "seconds": 2.5,
        "worker": "worker-1",
        "created_at": done.created_at.isoformat(),
        "finished_at": done.finished_at.isoformat(),
    }

    first = Measurement("kl_nats_per_token", 9.0, "nats/token", "measured", "report")
    final = Measurement("kl_nats_per_token", 0.4, "nats/token", "measured", "report", 0.1, 16384)
    store.add_measurements(trial.id, [first])
    store.add_measurements(trial.id, [final])
    reported = json.loads(json.dumps(store.trial(study.id, 7).to_json()))
    assert reported["measurements"] == {"kl_nats_per_token": final.to_json(), "size_bytes": exact.to_json()}
    assert reported["search"] == {"kl_nats_per_token": loss.to_json()}
    assert reported["on_frontier"]


def contents(store: Store) -> dict[str, list[tuple]]:
    with store._database.reading() as connection:
        return {table.name: sorted(map(repr, connection.execute(sa.select(table)))) for table in metadata.sorted_tables}


def test_a_late_result_changes_nothing(store):
    study = study_with(store)
    finished(store, study, 0, (2.0, 2.0))
    trial = store.start_trial(study.id, 1, assignment(1), "sampler")
    assert store.retry_trial(trial.id) == 2
    good = searched(study.objectives, (1.0, 1.0))
    before = contents(store)

    def late(attempt):
        assert not store.finish_trial(trial.id, attempt, good, {}, 1.0, "a", {"x": 1})
        assert not store.fail_trial(trial.id, attempt, "E", "m", "t", 1.0, "a", {"x": 1})
        assert contents(store) == before

    late(1)
    late(3)
    assert store.finish_trial(trial.id, 2, good, {}, 1.0, "b", {"x": 2})
    before = contents(store)
    late(2)
    assert store.study(study.id).sampler_attrs == {}
    assert store.trial(study.id, 1).worker == "b"
    assert numbers(store.frontier(study.id)) == [1]
    with pytest.raises(StoreError, match=r"^trial 1 of study 'demo' is complete and cannot run again$"):
        store.retry_trial(trial.id)
    assert contents(store) == before


def test_of_many_results_at_once_one_is_stored(url, store):
    study = study_with(store)
    trial = store.start_trial(study.id, 0, assignment(0), "sampler")
    gate = threading.Barrier(4)

    def finish(place):
        with Store.open(url) as own:
            gate.wait()
            return own.finish_trial(trial.id, 1, searched(study.objectives, (place, place)), {}, 1.0, f"w{place}")

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(finish, range(4)))
    assert won.count(True) == 1
    stored = store.trial(study.id, 0)
    assert stored.worker == f"w{won.index(True)}"
    assert stored.values(["size_bytes"]) == (float(won.index(True)),)


def test_a_failure_is_kept_whatever_its_text(store):
    study = study_with(store)
    trial = store.start_trial(study.id, 0, assignment(0), "seed")
    assert store.fail_trial(trial.id, 1, "ValueError", "a\0b \ud800", "x" * 70_000 + "end", 0.5, "w\0", {"k": 1})
    failed = store.trial(study.id, 0)
    assert (failed.state, failed.feasible, failed.on_frontier, failed.seconds) == ("failed", None, False, 0.5)
    assert (failed.error.type, failed.error.message, failed.worker) == ("ValueError", r"a\x00b \ud800", r"w\x00")
    assert failed.error.traceback.endswith("xend")
    assert len(failed.error.traceback) == 65536
    assert failed.to_json()["error"]["type"] == "ValueError"
    assert failed.sampler_attrs == {"k": 1}

    assert store.retry_trial(trial.id) == 2
    again = store.trial(study.id, 0)
    assert (again.state, again.error, again.seconds, again.finished_at) == ("running", None, None, None)


def test_a_number_is_given_once(store):
    study = study_with(store)
    store.start_trial(study.id, 0, assignment(0), "sampler")
    before = contents(store)
    with pytest.raises(
        StoreError, match=r"^study 'demo' has a trial 0 already; does another process run this study\?$"
    ):
        store.start_trial(study.id, 0, assignment(1), "sampler")
    assert contents(store) == before


def test_duplicates_point_to_the_trial_that_has_the_result(store):
    study = study_with(store)
    other = study_with(store)
    finished(store, study, 0, (1.0, 2.0))
    twin = store.record_duplicate(study.id, 1, assignment(0), 0, {"generation": 3})
    assert (twin.state, twin.duplicate_of, twin.hash) == ("duplicate", 0, assignment(0).hash)
    assert twin.finished_at == twin.created_at
    assert twin.sampler_attrs == {"generation": 3}
    assert store.find(study.id, assignment(0).hash).number == 0
    assert store.find(study.id, assignment(1).hash) is None
    assert store.find(other.id, assignment(0).hash) is None, "results belong to one study"

    trial = store.start_trial(study.id, 2, assignment(1), "sampler")
    assert store.find(study.id, assignment(1).hash) is None, "a running trial has no result"
    store.fail_trial(trial.id, 1, "E", "m", "t", 1.0, "w")
    assert store.find(study.id, assignment(1).hash).state == "failed"
    with pytest.raises(AssertionError):
        store.record_duplicate(study.id, 3, assignment(1), 0)


def test_assignments_are_shared_and_listed_only_when_asked(store):
    study, other = study_with(store), study_with(store)
    for where in (study, other):
        finished(store, where, 5, (1.0, 1.0))
    assert len(contents(store)["assignments"]) == 1
    assert store.trials(study.id)[0].assignment is None
    assert store.trials(study.id)[0].to_json()["assignment"] is None
    assert store.trials(study.id, with_assignments=True)[0].assignment == assignment(5)
    assert store.frontier(study.id, with_assignments=True)[0].assignment == assignment(5)
    assert store.assignment(assignment(5).hash) == assignment(5)


def test_paging_and_following(store):
    study = study_with(store)
    for number in range(5):
        finished(store, study, number, (5.0 - number, float(number)))
    store.start_trial(study.id, 5, assignment(5), "sampler")
    assert numbers(store.trials(study.id)) == [0, 1, 2, 3, 4, 5]
    assert numbers(store.trials(study.id, after=1, limit=2)) == [2, 3]
    assert all(len(trial.measurements) == 2 for trial in store.trials(study.id, after=1, limit=2))
    assert numbers(store.trials(study.id, states=["running"])) == [5]
    assert store.trials(study.id, states=[]) == []

    seen = store.study(study.id).changes
    assert store.trials(study.id, changed_since=seen) == []
    finished(store, study, 6, (0.5, 3.5))
    assert numbers(store.trials(study.id, changed_since=seen)) == [4, 6], "4 left the frontier"
    assert store.study(study.id).changes == max(trial.changed for trial in store.trials(study.id))


def test_the_list_of_studies_counts(store):
    first, second = study_with(store), study_with(store, [KL])
    finished(store, first, 0, (1.0, 2.0))
    finished(store, first, 1, (2.0, 1.0))
    finished(store, first, 2, (3.0, 3.0))
    store.record_duplicate(first.id, 3, assignment(0), 0)
    store.fail_trial(store.start_trial(first.id, 4, assignment(4), "seed").id, 1, "E", "m", "t", 1.0, "w")
    store.start_trial(first.id, 5, assignment(5), "seed")
    a, b = store.studies()
    assert (a.id, a.name, a.model, a.target) == (first.id, "demo", "tiny", "torch-cpu")
    assert (a.running, a.complete, a.failed, a.duplicate, a.frontier) == (1, 3, 1, 1, 2)
    assert (b.id, b.running, b.complete, b.failed, b.duplicate, b.frontier) == (second.id, 0, 0, 0, 0, 0)
    assert json.loads(json.dumps(a.to_json()))["trials"] == {
        "running": 1, "complete": 3, "stopped": 0, "failed": 1, "duplicate": 1
    }  # fmt: skip
    assert json.loads(json.dumps(first.to_json()))["objectives"][1] == {
        "name": "size_bytes", "unit": "bytes", "direction": "minimize"
    }  # fmt: skip


def test_reading_takes_few_statements_however_much_there_is(store):
    study = study_with(store)
    for number in range(12):
        finished(store, study, number, (1.0 + number, 12.0 - number))
    for _ in range(5):
        study_with(store)
    statements = []
    sa.event.listen(store._database._engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
    for read, most in (
        (lambda: store.studies(), 5),
        (lambda: store.trials(study.id), 2),
        (lambda: store.frontier(study.id), 2),
        (lambda: store.trials(study.id, with_assignments=True), 3),
    ):
        statements.clear()
        assert read()
        assert len([text for text in statements if text.startswith("SELECT")]) <= most, statements
        assert most > 2 or not any("assignments" in text for text in statements)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_stored(store, bad):
    study = study_with(store)
    trial = store.start_trial(study.id, 0, assignment(0), "sampler")
    before = contents(store)
    with pytest.raises(NotFinite, match=r"^kl_nats_per_token came out as -?(nan|inf) \(search part\)$"):
        store.finish_trial(trial.id, 1, searched(study.objectives, (bad, 1.0)), {}, 1.0, "w")
    with pytest.raises(NotFinite):
        store.finish_trial(trial.id, 1, searched(study.objectives, (1.0, 1.0), stderr=bad), {}, 1.0, "w")
    with pytest.raises(NotFinite, match="constraint on size_bytes"):
        store.finish_trial(trial.id, 1, searched(study.objectives, (1.0, 1.0)), {"size_bytes": bad}, 1.0, "w")
    assert contents(store) == before


def test_an_incomplete_result_is_rolled_back_whole(store):
    study = study_with(store)
    trial = store.start_trial(study.id, 0, assignment(0), "sampler")
    before = contents(store)
    with pytest.raises(AssertionError, match="no search value of size_bytes"):
        store.finish_trial(trial.id, 1, searched([KL], (1.0,)), {}, 1.0, "w")
    with pytest.raises(StoreError, match=r"is not complete$"):
        store.add_measurements(trial.id, searched([KL], (1.0,), part="report"))
    assert contents(store) == before


def test_what_violates_a_constraint_is_complete_and_never_on_the_frontier(store):
    study = study_with(store)
    finished(store, study, 0, (1.0, 1.0), {"size_bytes": 0.5})
    finished(store, study, 1, (2.0, 2.0), {"size_bytes": 0.0})
    finished(store, study, 2, (2.0, 2.0))
    assert [trial.feasible for trial in store.trials(study.id)] == [False, True, True]
    assert numbers(store.frontier(study.id)) == [1, 2], "equal points both stay"


def test_directions_decide_what_is_better(store):
    study = study_with(store, [ACCURACY, SIZE])
    finished(store, study, 0, (0.5, 10.0))
    finished(store, study, 1, (0.6, 10.0))
    finished(store, study, 2, (0.4, 5.0))
    assert numbers(store.frontier(study.id)) == [1, 2]


STREAMS = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from(["minimize", "maximize"]), min_size=count, max_size=count),
        st.lists(st.tuples(*[st.integers(0, 3)] * count, st.booleans()), min_size=1, max_size=14),
    )
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(STREAMS)
def test_the_frontier_kept_step_by_step_is_that_of_all_points(store, stream):
    directions, points = stream
    study = store.create_study(SPEC, [(f"o{place}", "u", direction) for place, direction in enumerate(directions)])
    for number, (*values, feasible) in enumerate(points):
        finished(store, study, number, [float(value) for value in values], {} if feasible else {"o0": 1.0})
    assert numbers(store.frontier(study.id)) == store.recompute_frontier(study.id)


def test_many_writers_keep_one_frontier(url, store):
    study = study_with(store, [KL, SIZE, ACCURACY])

    def write(place):
        with Store.open(url) as own:
            for step in range(12):
                number = place * 100 + step
                mixed = number * 2654435761 % 2**32
                finished(own, study, number, (float(mixed % 7), float(mixed // 7 % 11), float(mixed // 77 % 5)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert store.studies()[0].complete == 48
    assert numbers(store.frontier(study.id)) == store.recompute_frontier(study.id)


def test_a_trained_trial_has_its_layers_and_its_parent(store):
    study = study_with(store)
    parent = finished(store, study, 0, (1.0, 10.0))
    digests = ["a" * 40, "b" * 40]
    layers = {digests[0]: b"\0\xff" * 1000, digests[1]: b"other"}
    names = dict(zip(assignment(0), digests, strict=False))
    trained = Assignment(assignment(0), names)
    trial = store.start_trial(study.id, 1, trained, "recover", descent=Descent(0, {"steps": 3}, layers))
    assert store.finish_trial(trial.id, 1, searched(study.objectives, (0.5, 10.0)), {}, 1.0, "local")
    found = store.trial(study.id, 1)
    assert (found.parent, found.derivation, found.origin) == (0, {"steps": 3}, "recover")
    assert found.assignment == trained
    assert store.trained_layers(digests) == layers
    assert store.trained_layers([]) == {}
    assert store.find(study.id, parent.hash).number == 0
    assert numbers(store.frontier(study.id)) == [1]
    assert (parent.parent, parent.derivation, parent.to_json()["parent"]) == (None, None, None)
    # Another trial may share a layer.
    more = Assignment(assignment(1), {next(iter(assignment(1))): digests[0]})
    store.start_trial(study.id, 2, more, "recover", descent=Descent(1, {}, {digests[0]: layers[digests[0]]}))
    assert store.trained_layers(digests[:1]) == {digests[0]: layers[digests[0]]}
    with pytest.raises(NotFound, match=f"^no trained layer with digest '{'c' * 40}'$"):
        store.trained_layers(["c" * 40])


def test_a_number_that_is_taken_leaves_no_layers_behind(store):
    study = study_with(store)
    finished(store, study, 0, (1.0, 10.0))
    with pytest.raises(StoreError, match="has a trial 0 already"):
        store.start_trial(study.id, 0, assignment(1), "recover", descent=Descent(0, {}, {"d" * 40: b"x"}))
    with pytest.raises(NotFound):
        store.trained_layers(["d" * 40])
