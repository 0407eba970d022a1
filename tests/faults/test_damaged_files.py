"""Files that are cut short, or in which a disk has turned a bit: databases, the bank, exports."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

from autoq.bank import Bank, weight_hash
from autoq.cli import app
from autoq.errors import AutoQError, NotFound, StoreError
from autoq.scheme import parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.copying import copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def damage(content, dice):
    """The bytes with one of: a turned bit, a sector of zeros, an end that is missing; and which."""
    how = dice.choice(["bit", "bit", "bit", "sector", "cut"])
    place = dice.randrange(len(content))
    if how == "cut":
        return content[:place], how
    broken = bytearray(content)
    if how == "bit":
        broken[place] ^= 1 << dice.randrange(8)
    else:
        place -= place % 512
        broken[place : place + 512] = bytes(len(broken[place : place + 512]))
    return bytes(broken), how


def seen(store, study_id):
    """All that a reader gets of a study, as JSON text: numbers, frontier, spec, plan, tables, columns of figures."""
    study = store.study(study_id)
    trials = store.trials(study_id, with_assignments=True)
    (summary,) = store.studies()
    rows, measured = store.trial_columns(study_id)
    return json.dumps(
        {
            "trials": [trial.to_json() | {"created_at": 0, "finished_at": 0, "worker": 0} for trial in trials],
            "frontier": [trial.number for trial in store.frontier(study_id)],
            "alone": [store.trial(study_id, trial.number).on_frontier for trial in trials],
            "study": [dict(study.spec), study.objectives, study.plan, dict(study.sampler_attrs)],
            "tables": [store.table(study_id, name) for name in TABLES],
            "counts": [summary.complete, summary.stopped, summary.failed, summary.duplicate, summary.frontier],
            "rows": [row[:8] for row in rows],
            "measured": measured,
        }
    )


@pytest.fixture(scope="module")
def finished(made_up, tiny_model_dir, tmp_path_factory):
    """The bytes of a database with a finished study, and all that a reader gets of it."""
    path = tmp_path_factory.mktemp("finished") / "autoq.db"
    with Store.open(str(path)) as store:
        study = create_study(store, made_up.spec(tiny_model_dir("llama"), 40))
        run_study(store, study.id, None, made_up.make)
        with store._database.reading() as connection:
            TABLES.extend(connection.exec_driver_sql("SELECT name FROM tables ORDER BY name").scalars())
        whole = seen(store, study.id)
    assert not path.with_name("autoq.db-wal").exists()
    return path.read_bytes(), whole


TABLES: list[str] = []


def test_a_damaged_database_is_refused_or_gives_the_numbers_that_were_measured(
    finished, tmp_path, rounds, record_testsuite_property
):
    content, whole = finished
    dice, counts, lines = random.Random(0), {}, set()
    for turn in range(rounds(60, 4000)):
        broken, how = damage(content, dice)
        path = tmp_path / f"{turn}.db"
        path.write_bytes(broken)
        try:
            with Store.open(str(path), create=False) as store:
                found = seen(store, store.studies()[0].id)
                verdict = "as measured"
                if found != whole:
                    # No row tells of one that is gone with a stretch of an index: who looks for damage finds it.
                    verdict = "found by doctor"
                    with pytest.raises(StoreError, match=r"^[^\n]*is damaged[^\n]*$"):
                        copy(store, None)
        except StoreError as problem:
            verdict = "refused"
            lines.add(len(str(problem).splitlines()))
        except (NotFound, IndexError):
            verdict = "not there"  # a study's row that is gone
        counts[how, verdict] = counts.get((how, verdict), 0) + 1
        for left in tmp_path.glob(f"{turn}.db*"):
            left.unlink()
    assert lines == {1}
    assert counts["cut", "refused"]
    assert counts["bit", "as measured"]
    record_testsuite_property("damaged databases", f"{counts}")


def test_every_number_of_a_trial_is_under_its_checksum(made_up, finished, tmp_path):
    """A number that is another one, in a file that is a good database."""
    content, _ = finished
    path = tmp_path / "autoq.db"
    changes = {
        "measurements": ["value = value * 1.0000001", "stderr = stderr + 1e-9", "n = n + 1", "unit = 'bits'"],
        "trials": [
            "feasible = 0",
            "baseline = 'mine'",
            "attempt = 2",
            "seconds = seconds + 1",
            "number = 1000 + number",
        ],
    }
    for table, settings in changes.items():
        for setting in settings:
            path.write_bytes(content)
            with Store.open(str(path)) as store:
                with store._database.writing() as connection:
                    one = "trial_id" if table == "measurements" else "id"
                    connection.exec_driver_sql(f"UPDATE {table} SET {setting} WHERE {one} = 7")
                with pytest.raises(StoreError, match=r"^trial \d+ of study 'made-up' is damaged: [^\n]*$"):
                    store.trials(1)
                with pytest.raises(StoreError, match="is damaged"):
                    run_study(store, 1, None, made_up.make)
    done = CliRunner().invoke(app, ["trials", "made-up", "--db", str(path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("autoq: trial 1006 of study 'made-up' is damaged")


def test_a_damaged_bank_makes_its_layers_again(tmp_path, rounds, record_testsuite_property):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    known, scheme = weight_hash(weight), parse_scheme("rtn-int4-g32")
    bank = Bank(tmp_path / "bank", 10**9, 0)
    wanted = bank.quantized(weight, known, scheme).dequantize()
    (path,) = [path for path in (tmp_path / "bank").rglob("*") if path.is_file()]
    content, dice, number = path.read_bytes(), random.Random(0), rounds(100, 5000)
    for turn in range(number):
        broken, _ = damage(content, dice)
        path.write_bytes(broken)
        again = Bank(tmp_path / "bank", 10**9, 0)
        assert torch.equal(again.quantized(weight, known, scheme).dequantize(), wanted), turn
        if broken != content and again.hits == 0:
            assert (again.corrupt, again.made) == (1, 1)
        last = Bank(tmp_path / "bank", 10**9, 0)
        assert torch.equal(last.quantized(weight, known, scheme).dequantize(), wanted)
        assert (last.hits, last.corrupt) == (1, 0)
    record_testsuite_property("damaged bank entries", f"{number}")


def test_a_damaged_export_is_not_taken_for_a_good_one(
    tiny_model_dir, tmp_path, rounds, monkeypatch, record_testsuite_property
):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    spec = build_spec(
        {
            "name": "tiny",
            "model": {"id": str(tiny_model_dir("llama"))},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "sampler": {"name": "random", "seeds": 0},
            "budget": {"trials": 5},
            "workers": {"cpus": 1},
        }
    )
    dice, number, refused, lines = random.Random(0), rounds(10, 300), 0, set()
    with Store.open(str(tmp_path / "autoq.db")) as store:
        study = create_study(store, spec)
        run_study(store, study.id)
        study = store.study(study.id)
        export(store, study, store.frontier(study.id, with_assignments=True)[0], tmp_path / "whole")
        assert verify(tmp_path / "whole", latency=False).ok
        files = sorted(
            path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
        )
        out = tmp_path / "out"
        for turn in range(number):
            shutil.copytree(tmp_path / "whole", out)
            path = out / files[turn % len(files)]
            content = path.read_bytes()
            broken, how = damage(content, dice)
            path.write_bytes(broken)
            if broken != content:
                try:
                    ok = verify(out, latency=False).ok
                except AutoQError as problem:
                    ok = False
                    lines.add(len(str(problem).splitlines()))
                # The manifest itself is not under a checksum: what it says is held against the files and the runtime.
                assert not ok or path.name == "autoq.json", (turn, how, path)
                refused += not ok
            shutil.rmtree(out)
    assert lines <= {1}
    record_testsuite_property("damaged exports", f"{refused} of {number} refused")
