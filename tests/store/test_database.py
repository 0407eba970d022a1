"""What is SQLite's own, what a URL may be, and which mistakes are told how."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import BadInput, NotFound, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Store

SPEC = build_spec({"model": {"id": "tiny"}, "name": "demo"})
OBJECTIVES = [("size_bytes", "bytes", "minimize")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "autoq.db"


def finish(store, study, number, text=""):
    assignment = Assignment({f"layer.{number}": parse_scheme("keep")})
    trial = store.start_trial(study.id, number, assignment, "sampler", sampler_attrs={"text": text})
    found = [Measurement("size_bytes", float(number), "bytes", "computed", "search")]
    assert store.finish_trial(trial.id, 1, found, {}, 1.0, "local")


def test_a_path_and_a_url_name_the_same_file(path):
    with Store.open(str(path)) as store:
        study = store.create_study(SPEC, OBJECTIVES)
        assert store.url == str(path)
    with Store.open(f"sqlite:///{path}", create=False) as store:
        assert store.study("demo") == study


def test_a_relative_path_is_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store.open("here.db").close()
    assert (tmp_path / "here.db").is_file()


def test_every_connection_is_durable_waits_and_checks_references(path):
    with Store.open(str(path)) as store:
        asked = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        with store._database.reading() as connection:
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in asked]
    assert found == ["wal", 2, 1, 30_000]


def test_a_missing_file_is_not_made_for_a_reader(path):
    with pytest.raises(NotFound, match=r"^no database at '[^']*autoq\.db'; run `autoq search` first"):
        Store.open(str(path), create=False)
    assert not path.exists()


def test_an_empty_file_is_a_new_database(path):
    path.touch()
    with Store.open(str(path)) as store:
        assert store.studies() == []


def test_a_folder_is_not_a_database(tmp_path):
    for create in (True, False):
        with pytest.raises(StoreError, match=r"is a folder$"):
            Store.open(str(tmp_path), create=create)
    with pytest.raises(StoreError, match=r"there is no folder '[^']*absent'$"):
        Store.open(str(tmp_path / "absent" / "autoq.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_left_as_it_is(path):
    path.write_bytes(b"name: not a database\n" * 100)
    with pytest.raises(StoreError, match=r"^the database '\S*autoq\.db' is not an SQLite database$"):
        Store.open(str(path))
    assert path.read_bytes() == b"name: not a database\n" * 100


def test_a_damaged_file_is_said_to_be_damaged(path):
    with Store.open(str(path)) as store:
        study = store.create_study(SPEC, OBJECTIVES)
        for number in range(50):
            finish(store, study, number, "x" * 500)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    with (
        pytest.raises(StoreError, match=r"^the database \S+ is damaged: not a valid SQLite file$"),
        Store.open(str(path)) as store,
    ):
        store.trials(study.id)


def test_a_full_disk_keeps_what_was_stored(path):
    def stop_growing(connection, _):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 20}")

    with Store.open(str(path)) as store:
        study = store.create_study(SPEC, OBJECTIVES)
        store._database.close()
        sa.event.listen(store._database._engine, "connect", stop_growing)

        def fill():
            for number in range(1000):
                finish(store, study, number, "x" * 5000)

        with pytest.raises(StoreError, match=r"^the database \S+ cannot grow: the disk is full; [^\n]* intact$"):
            fill()
        stored = store.studies()[0].complete
        assert 0 < stored < 100
        assert len(store.trials(study.id, states=["complete"])) == stored
    with Store.open(str(path)) as store:
        assert [trial.number for trial in store.trials(study.id, states=["complete"])] == list(range(stored))
        assert [trial.number for trial in store.frontier(study.id)] == store.recompute_frontier(study.id) == [0]
        for trial in store.running_trials(study.id):
            assert store.retry_trial(trial.id) == 2
        finish(store, study, 2000)
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "the database '' is not a file on disk; give a path such as autoq.db"),
        ("sqlite:///:memory:", "the database ':memory:' is not a file on disk; give a path such as autoq.db"),
        (":memory:", "the database ':memory:' is not a file on disk; give a path such as autoq.db"),
        ("", "the database '' is not a file on disk; give a path such as autoq.db"),
        ("oracel://h/db", "no database 'oracel'; choose from sqlite, postgresql+psycopg"),
        ("sqlite+aiosqlite:///a.db", "the database driver 'sqlite+aiosqlite' is asynchronous; choose one that is not"),
        (
            "postgresql://u:s3cret@h:port/db",
            "the database URL postgresql://… cannot be read as a SQLAlchemy URL",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(BadInput) as said:
        Store.open(url)
    assert str(said.value) == message


def test_a_driver_that_is_not_installed_is_named():
    with pytest.raises(StoreError) as said:
        Store.open("mysql+pymysql://user:s3cret@localhost/db")
    assert str(said.value) == "the database driver 'mysql+pymysql' is not installed: pip install pymysql"


def test_a_server_that_does_not_answer_is_said_without_the_password():
    with pytest.raises(StoreError) as said:
        Store.open("postgresql://user:s3cret@127.0.0.1:1/db")
    text = str(said.value)
    assert text.startswith("the database 'postgresql+psycopg://user:***@127.0.0.1:1/db' cannot be reached: ")
    assert "refused" in text
    assert "s3cret" not in text
    assert "\n" not in text


def test_reading_imports_nothing_heavy(path):
    with Store.open(str(path)) as store:
        store.create_study(SPEC, OBJECTIVES)
    heavy = ("torch", "transformers", "optuna", "ray", "numpy", "pydantic", "alembic", "sqlalchemy.orm")
    program = f"""
import sys
from autoq.store import Store
with Store.open({str(path)!r}, create=False) as store:
    assert store.frontier(store.study("demo").id) == []
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_read_only_database_can_be_read(path):
    with Store.open(str(path)) as store:
        store.create_study(SPEC, OBJECTIVES)
        store._database.close()
        # The same error as that of a read-only file, which root could write.
        sa.event.listen(store._database._engine, "connect", lambda raw, _: raw.execute("PRAGMA query_only = ON"))
        assert store.study("demo").state == "created"
        with pytest.raises(StoreError, match=r"^the database '\S*autoq\.db' is read-only$"):
            store.set_state(1, "running")


GOLDEN = Path(__file__).parents[1] / "golden" / "store_v1.sql"


def test_a_database_of_the_first_schema_still_opens(path):
    with sqlite3.connect(path) as raw:
        raw.executescript(GOLDEN.read_text(encoding="utf-8"))
    raw.close()
    with Store.open(str(path), create=False) as store:
        study = store.study("golden")
        assert (study.state, study.message, study.plan) == ("interrupted", "Ctrl-C", {"seeds": 1})
        assert study.study_spec().constraints["size_bytes"].max == 3000
        assert study.sampler_attrs == {"seen": [0]}
        assert store.table(study.id, "sensitivity") == {"up": {"rtn-int4-g64": 0.25}}
        trials = store.trials(study.id, with_assignments=True)
        assert [trial.state for trial in trials] == [
            "complete", "complete", "failed", "duplicate", "complete", "running"
        ]  # fmt: skip
        assert [trial.feasible for trial in trials] == [True, True, None, None, False, None]
        assert all(trial.assignment.hash == trial.hash for trial in trials)
        assert str(trials[0].assignment["up"]) == "rtn-int8-channel-sym-a8dyn"
        assert [trial.number for trial in store.frontier(study.id)] == store.recompute_frontier(study.id) == [0, 1]
        assert trials[1].to_json()["measurements"]["kl_nats_per_token"]["value"] == 0.625
        assert trials[1].to_json()["search"]["kl_nats_per_token"]["value"] == 0.5
        assert trials[2].error.to_json() == {
            "type": "ValueError", "message": "no", "traceback": "Traceback …\nValueError: no"
        }  # fmt: skip
        assert trials[3].duplicate_of == 1
        assert store.retry_trial(trials[5].id) == 2
        assert store.token_values(study.id, 0, "kl_nats_per_token", "search") is None
        assert store.sensitivities("anything") is None
