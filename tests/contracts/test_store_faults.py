"""The store under kills, locks and foreign tables, on every database behind it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import sqlalchemy as sa

from autoq.errors import StoreError
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.models import SCHEMA, VERSION_TABLE

SPEC = build_spec({"model": {"id": "tiny"}, "name": "demo"})
KL = ("kl_nats_per_token", "nats/token", "minimize")
SIZE = ("size_bytes", "bytes", "minimize")
ACCURACY = ("accuracy", "fraction", "maximize")
SCHEMES = [parse_scheme(f"rtn-int{bits}-g64") for bits in range(2, 9)]
PASSWORD = "s3cret/word"


OPENER = """
import sys
from autoq.store import Store
print("ready", flush=True)
sys.stdin.readline()
with Store.open(sys.argv[1]) as store:
    store.studies()
"""


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_succeed(url):
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for opener in openers:
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        opener.stdin.write("go\n")
        opener.stdin.flush()
    for opener in openers:
        _, errors = opener.communicate(timeout=200)
        assert (opener.returncode, errors) == (0, "")


WRITER = """
import itertools, sys
from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Ending, NewTrial, Store

store = Store.open(sys.argv[1])
study = store.create_study(build_spec({"model": {"id": "tiny"}}), [("a", "u", "minimize"), ("b", "u", "minimize")])
size = int(sys.argv[2])
for first in itertools.count(step=size):
    new, found = [], {}
    for number in range(first, first + size):
        schemes = {f"layer.{place}": parse_scheme(f"rtn-int{2 + number // 7**place % 7}-g64") for place in range(6)}
        new.append(NewTrial(number, Assignment(schemes), "sampler"))
        values = {"a": number * 37 % 101, "b": number * 53 % 97}
        found[number] = [Measurement(name, float(value), "u", "measured", "search") for name, value in values.items()]
    begun = store.start_trials(study.id, new)
    assert None not in store.end_trials([Ending(trial.id, 1, 1.0, "w", found[trial.number]) for trial in begun])
    print(first + size - 1, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7])
def test_killing_the_writer_loses_no_acknowledged_result(url, size):
    with subprocess.Popen([sys.executable, "-c", WRITER, url, str(size)], stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(40 // size):
            assert writer.stdout.readline(), "the writer ended by itself"
        writer.send_signal(signal.SIGKILL)
        acknowledged = 40 // size * size - 1
        for line in writer.stdout:
            acknowledged = int(line)
    assert writer.returncode == -signal.SIGKILL
    with Store.open(url) as store:
        study = store.study("study")
        trials = store.trials(study.id, states=["complete"])
        assert [t.number for t in trials] == list(range(len(trials)))
        assert len(trials) - acknowledged - 1 in (0, size), "a group is there or it is not"
        assert all(trial.values(["a", "b"]) == (trial.number * 37 % 101, trial.number * 53 % 97) for trial in trials)
        assert [t.number for t in store.frontier(study.id)] == store.recompute_frontier(study.id)
        assert len(store.running_trials(study.id)) in (0, size)


def test_a_locked_database_is_said_in_one_line(url, store):
    study = store.create_study(SPEC, [KL])
    holder = sa.create_engine(url, poolclass=sa.NullPool)
    sqlite = holder.dialect.name == "sqlite"
    options = f"{holder.url.query.get('options')} -c lock_timeout=100"
    impatient = holder.url.update_query_dict({"timeout": "0.1"} if sqlite else {"options": options})
    with holder.connect() as connection, Store.open(impatient.render_as_string(hide_password=False)) as other:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if sqlite else "LOCK TABLE studies IN EXCLUSIVE MODE")
        with pytest.raises(
            StoreError, match=r"^the database [^\n]* stays locked by another process; try again$"
        ) as said:
            other.set_state(study.id, "running")
        assert PASSWORD not in str(said.value)
        assert other.study("demo").state == "created", "readers do not wait for writers"
        connection.rollback()
        other.set_state(study.id, "running")
    assert store.study("demo").state == "running"


def test_a_newer_schema_is_refused(url):
    with Store.open(url) as store, store._database.writing() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(
        StoreError, match=rf"^[^\n]*made by a newer AutoQ \(schema 9999, this one knows up to {SCHEMA}\)"
    ):
        Store.open(url)


def test_tables_of_something_else_are_left_alone(url):
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE trials (trial_id INTEGER)")
    with pytest.raises(StoreError, match=r"has tables of something else \(trials\)") as said:
        Store.open(url)
    assert PASSWORD not in str(said.value)
    assert sa.inspect(engine).get_table_names() == ["trials"]


def test_the_password_is_never_shown(url, store):
    assert "s3cret" not in store.url
    if store.url.startswith("postgresql"):
        wrong = sa.make_url(url).set(database="absent").render_as_string(hide_password=False)
        with pytest.raises(
            StoreError, match=r"^[^\n]*autoq:\*\*\*@\S*' cannot be reached: [^\n]*\"absent\" does not"
        ) as said:
            Store.open(wrong)
        assert "s3cret" not in str(said.value)
