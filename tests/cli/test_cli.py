"""The command line: what it prints, how it ends, and what it does not import."""

import contextlib
import csv
import io
import json
import os
import pty
import sqlite3
import subprocess
import sys

import pytest
import yaml

from autoq.measurement import Measurement
from autoq.spec import parse_spec
from autoq.store import Store

from .conftest import OBJECTIVES, mixed

FRONTIER = """\
                               kl_nats_                 latency_
trial      origin             per_token  size_bytes    decode_ms
    5      sampler          0.61 ±0.02s    72.00 MB       11.00p
    4      sampler         0.172 ±0.006    79.80 MB  12.30 ±0.10
    2  -   uniform-int4    0.420 ±0.010    80.00 MB  12.40 ±0.10
    3  ~4  seed            0.170 ±0.006    80.00 MB  12.30 ±0.10
    1      uniform-int8  0.0040 ±0.0002    140.0 MB  17.50 ±0.10
    0      unquantized                0    270.0 MB    31.2 ±0.3

±  one standard error
p  predicted, not measured
s  measured on the search part of the data only
-  a baseline that is not on the frontier
~  beyond noise no better than the row above, or than the trial of that number

trial 3 against uniform-int4: 1.00 × its size_bytes, 0.99 × its
latency_decode_ms and 0.40 × its kl_nats_per_token (0.17 against 0.42)
"""

TRIALS = """\
                                   kl_nats_                 latency_
trial          origin             per_token  size_bytes    decode_ms
    0  *       unquantized                0    270.0 MB    31.2 ±0.3
    1  *       uniform-int8  0.0040 ±0.0002    140.0 MB  17.50 ±0.10
    2          uniform-int4    0.420 ±0.010    80.00 MB  12.40 ±0.10
    3  *       seed            0.170 ±0.006    80.00 MB  12.30 ±0.10
    4  *       sampler         0.172 ±0.006    79.80 MB  12.30 ±0.10
    5  *       sampler          0.61 ±0.02s    72.00 MB       11.00p
    6          sampler          0.90 ±0.03s    90.00 MB       13.00p
    7  = 3     sampler
    8  failed  sampler

*  on the frontier
±  one standard error
p  predicted, not measured
s  measured on the search part of the data only

trial 8: NotFinite: kl_nats_per_token is not a number
"""

DIFF = """\
layer                  trial 2       trial 3        bytes
model.layers.0.q_proj  rtn-int4-g64  rtn-int8-g64  +256 B

1 layer differs

objective               trial 2       trial 3   change
kl_nats_per_token  0.420 ±0.010  0.170 ±0.006  -0.2500  nats/token
latency_decode_ms   12.40 ±0.10   12.30 ±0.10  -0.1000  ms
size_bytes             80.00 MB      80.00 MB      0 B
"""

COMMANDS = [
    *["plan", "search", "resume", "sensitivity", "studies", "trials", "frontier", "pick", "diff", "report"],
    *["recover", "sequential", "export", "verify", "serve", "token", "submit", "cancel", "remove"],
    *["methods", "targets", "objectives", "samplers", "doctor", "copy"],
]


def stripped(text):
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_the_frontier_in_80_columns(autoq):
    result = autoq("frontier", "demo")
    assert result.exit_code == 0
    assert stripped(result.stdout) == FRONTIER
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_study_is_found_by_its_id(autoq):
    assert autoq("frontier", "1").stdout == autoq("frontier", "demo").stdout


def test_trials_show_how_each_ended(autoq):
    assert stripped(autoq("trials", "demo").stdout) == TRIALS
    numbers = [
        trial["number"] for trial in json.loads(autoq("trials", "demo", "--json", "--limit", "3").stdout)["trials"]
    ]
    assert numbers == [0, 1, 2]


def test_a_trial_that_was_given_up_says_so_feasible_or_not(autoq, database):
    with Store.open(database) as store:
        trial = store.start_trial(1, 9, mixed("rtn-int3-g64", "keep", "rtn-int4-g64"), "sampler")
        detail = {"rival": 3, "of": 2048, "estimate": 0.5}
        values = [
            Measurement(name, 0.9, unit, "measured", "search", 0.1, 256, detail=detail if unit == "nats/token" else {})
            for name, unit, _ in OBJECTIVES
        ]
        assert store.stop_trial(trial.id, 1, values, {"size_bytes.max": 0.5}, 0.1, "local")
    # Over other tokens than trial 6, so there is no difference to show.
    assert "not comparable" in autoq("diff", "demo", "6", "9").stdout
    shown = autoq("trials", "demo", "--state", "stopped").stdout
    assert shown.splitlines()[2].split()[:3] == ["9", "stopped", "sampler"]
    assert "stopped  given up as worse than a finished trial; values so far" in shown


def test_trials_by_state(autoq):
    document = json.loads(autoq("trials", "demo", "--state", "failed", "--json").stdout)
    (trial,) = document["trials"]
    assert trial["number"] == 8
    assert trial["error"]["type"] == "NotFinite"


def test_frontier_as_json_has_the_documented_shape(autoq):
    document = json.loads(autoq("frontier", "demo", "--json").stdout)
    assert document["study"] == "demo"
    assert document["objectives"][1] == {"name": "size_bytes", "unit": "bytes", "direction": "minimize"}
    assert [trial["number"] for trial in document["trials"]] == [0, 1, 3, 4, 5]
    third = document["trials"][2]
    assert third["on_frontier"] is True
    assert third["assignment"]["model.layers.0.q_proj"] == "rtn-int8-g64"
    latency = third["measurements"]["latency_decode_ms"]
    assert (latency["value"], latency["kind"], latency["part"]) == (12.3, "measured", "report")
    assert third["search"]["latency_decode_ms"]["kind"] == "predicted"


def test_frontier_as_csv(autoq):
    rows = list(csv.DictReader(io.StringIO(autoq("frontier", "demo", "--csv").stdout)))
    assert [row["number"] for row in rows] == ["0", "1", "3", "4", "5"]
    assert rows[4]["latency_decode_ms_kind"] == "predicted"
    assert float(rows[2]["size_bytes"]) == 80e6


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        (["--max", "size_bytes=80MB"], [3, 4, 5]),
        (["--max", "size_bytes=80MB", "--min", "latency_decode_ms=12"], [3, 4]),
        (["--max", "kl_nats_per_token=1e-2"], [0, 1]),
        (["--min", "size_bytes=1TB"], []),
    ],
)
def test_frontier_within_limits(autoq, limits, numbers):
    document = json.loads(autoq("frontier", "demo", "--json", *limits).stdout)
    assert [trial["number"] for trial in document["trials"]] == numbers


def test_pick_prints_the_best_trial_within_limits(autoq):
    limits = ["--max", "size_bytes=79.9MB", "--best", "kl_nats_per_token"]
    document = json.loads(autoq("pick", "demo", *limits, "--json").stdout)
    assert document["number"] == 4
    assert len(document["assignment"]) == 3
    in_yaml = yaml.safe_load(autoq("pick", "demo", *limits).stdout)
    assert in_yaml["assignment"] == document["assignment"]
    assert in_yaml["hash"] == document["hash"]


def test_pick_when_nothing_fits_names_the_closest(autoq):
    result = autoq("pick", "demo", "--max", "size_bytes=10MB")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "has size_bytes at most 10.00 MB; the closest is trial 5 with size_bytes 72.00 MB" in result.stderr


def test_diff_names_layers_bytes_and_what_changed(autoq, database):
    from autoq.store import Store

    shape = {"kind": "linear", "out_features": 8, "in_features": 64, "dtype_bytes": 2}
    with Store.open(database) as store:
        assert "bytes" not in autoq("diff", "demo", "2", "3").stdout.splitlines()[0]
        store.put_table(1, "layers", {f"model.layers.{layer}": shape for layer in ("0.q_proj", "0.down_proj")})
    assert stripped(autoq("diff", "demo", "uniform-int4", "3").stdout) == DIFF
    document = json.loads(autoq("diff", "demo", "2", "3", "--json").stdout)
    assert document["layers"] == {
        "model.layers.0.q_proj": {"a": "rtn-int4-g64", "b": "rtn-int8-g64", "bytes_a": 280, "bytes_b": 536}
    }


def test_a_duplicate_stands_for_the_trial_it_repeats(autoq):
    assert "the same assignment" in autoq("diff", "demo", "3", "7").stdout


def test_studies(autoq):
    assert "demo   finished" in autoq("studies").stdout
    (study,) = json.loads(autoq("studies", "--json").stdout)["studies"]
    assert study["study"] == "demo"
    assert study["trials"] == {"running": 0, "complete": 7, "stopped": 0, "failed": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("command", "member"),
    [("methods", "rtn"), ("targets", "torch-cpu"), ("objectives", "size_bytes"), ("samplers", "nsga2")],
)
def test_what_there_is(autoq, command, member):
    assert member in autoq(command).stdout
    entries = json.loads(autoq(command, "--json").stdout)[command]
    assert member in [entry["name"] for entry in entries]
    assert all(entry["summary"] for entry in entries)


def test_doctor_reports_and_survives_what_is_absent(autoq, monkeypatch):
    from importlib import metadata

    known = metadata.version

    def version(package):
        if package in ("ray", "torch"):
            raise metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(metadata, "version", version)
    result = autoq("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert (found["torch"]["ok"], found["ray"]["ok"], found["numpy"]["ok"]) == (False, None, True)
    assert "autoq[ray]" in found["ray"]["value"]
    assert "whole; studies: 1, trials: 9" in next(f["value"] for f in found.values() if f["section"] == "database")
    assert result.exit_code == 1
    assert "!!  torch" in autoq("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["frontier", "demi"], 2, "no study 'demi'; did you mean 'demo'?"),
        (["serach"], 2, "Did you mean 'search'?"),
        (["frontier"], 2, "Missing argument 'STUDY'"),
        (["frontier", "demo", "--jsno"], 2, "--json"),
        (["frontier", "demo", "extra"], 2, "extra"),
        (["frontier", "demo", "--json", "--csv"], 2, "either --json or --csv"),
        (["frontier", "demo", "--max", "size_bytes"], 2, "--max 'size_bytes' must look like size_bytes=90MB"),
        (["frontier", "demo", "--max", "size_bytes=9XB"], 2, "the limit on size_bytes must be a size"),
        (["frontier", "demo", "--max", "kl_nats_per_token=9MB"], 2, "the limit on kl_nats_per_token must be a number"),
        (["frontier", "demo", "--max", "a=1", "--max", "a=2"], 2, "--max names a twice"),
        (["pick", "demo", "--max", "size=1"], 2, "no measured objective 'size'; choose from kl_nats_per_token"),
        (["pick", "demo", "--best", "accuracy"], 2, "choose from kl_nats_per_token, latency_decode_ms, size_bytes"),
        (["pick", "demo", "--json", "--yaml"], 2, "either --json or --yaml"),
        (
            ["trials", "demo", "--state", "done"],
            2,
            "'done' is not one of 'running', 'complete', 'stopped', 'failed', 'duplicate'",
        ),
        (["trials", "demo", "--limit", "0"], 2, "'--limit': must be at least 1 (got '0'); see"),
        (["trials", "demo", "--limit=x"], 2, "'--limit': must be a whole number (got 'x'); see"),
        (["diff", "demo", "99", "1"], 2, "no trial 99"),
        (["diff", "demo", "uniform-int5", "1"], 2, "uniform-int4, uniform-int8, unquantized"),
        (["frontier", "demo", "--db", "nowhere.db"], 2, "no database at 'nowhere.db'"),
        (["frontier", "demo", "--db", "mysql://u:secret@h/d"], 1, "mysql"),
        (["search", "nowhere.yaml"], 2, "no spec file 'nowhere.yaml'"),
        (["search", "demo", "--trials", "0"], 2, "budget.trials: must be at least 1 (got 0)"),
        (["search", "demo", "--workers", "2"], 2, "count 2 needs executor ray"),
        (["search", "demo", "--name", "a b"], 2, "name: must start with a letter or digit"),
        (["search", "demo", "--name", "no", "--trials", "0"], 2, "budget.trials"),
        (["search", "demo", "--set", "sampler.sed=1"], 2, "did you mean 'seed'?"),
    ],
)
def test_mistakes_end_in_one_line(autoq, arguments, code, fragment):
    result = autoq(*arguments)
    assert fragment in result.stderr
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("autoq: ")
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.stderr


def test_debug_shows_the_traceback_wherever_it_stands(autoq):
    for arguments in (["--debug", "frontier", "demi"], ["frontier", "demi", "--debug"]):
        result = autoq(*arguments)
        assert "Traceback" in result.stderr
        assert result.exit_code == 2


def test_a_bug_is_one_line_too(autoq, monkeypatch):
    from autoq.store import Store

    def broken(self):
        raise KeyError("surprise")

    monkeypatch.setattr(Store, "studies", broken)
    result = autoq("studies")
    assert result.exit_code == 1
    assert result.stderr == "autoq: internal error: KeyError: 'surprise'; --debug shows the traceback\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(autoq, command):
    result = autoq(command, "--help")
    assert result.exit_code == 0
    assert f"    autoq {command}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_lists_every_command_and_nothing_else(autoq):
    result = autoq()
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert "..." not in "".join(listed)


def start(arguments, folder, **environment):
    """Run a fresh interpreter; what it ended with, and the heavy modules it loaded."""
    probe = (
        "import sys\nfrom autoq.cli import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'optuna', 'pandas', 'ray', 'alembic', 'plotly'} & set(sys.modules)\n"
        "    sys.stderr.write('loaded: ' + ' '.join(sorted(heavy)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=200, env={"PATH": "", **environment},
    )  # fmt: skip
    return done, done.stderr.rpartition("loaded: ")[2].split()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["frontier", "demo"], ["studies"], ["pick", "demo", "--max", "size_bytes=90MB"], ["methods"]],
)
def test_looking_is_cheap(database, tmp_path, arguments):
    done, loaded = start(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert loaded == []


def test_no_color_and_no_terminal_mean_plain_text(database, tmp_path):
    done, _ = start(["frontier", "demo"], tmp_path, NO_COLOR="1", PYTHONUTF8="1")
    assert "\x1b" not in done.stdout
    assert stripped(done.stdout) == FRONTIER


def test_the_database_comes_from_the_environment(database, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert start(["studies"], elsewhere)[0].returncode == 2
    assert start(["studies"], elsewhere, AUTOQ_DB=database)[0].returncode == 0
    assert not list(elsewhere.iterdir())


def test_a_reader_that_has_enough_is_no_error(database, tmp_path):
    command = f"{sys.executable} -c 'from autoq.cli import main; main()' trials demo --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.stdout == "{"
    assert done.stderr == ""


def test_limits_that_nothing_keeps_are_told_apart_from_a_study_without_results(autoq):
    assert (
        autoq("frontier", "demo", "--max", "size_bytes=1").stdout
        == "study demo: no feasible trial is within the limits\n"
    )


def test_infeasible_baselines_stand_with_a_word(autoq, database):
    with Store.open(database) as store:
        study = store.create_study(parse_spec("name: bare\nmodel: {id: some/model}"), OBJECTIVES)
        trial = store.start_trial(study.id, 0, mixed("keep", "keep", "keep"), "baseline", "unquantized")
        values = [Measurement(name, 1.5, unit, "measured", "search", 0.1) for name, unit, _ in OBJECTIVES]
        assert store.finish_trial(trial.id, 1, values, {"size_bytes.max": 0.5}, 0.1, "local")
    lines = autoq("frontier", "bare").stdout.splitlines()
    assert "unquantized" in lines[2]
    assert lines[-1] == "study bare: no feasible trial is complete yet"


def test_report_writes_one_file(autoq, tmp_path):
    done = autoq("report", "demo", "--out", "demo.html")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    text = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "uniform-int4" in text
    missing = autoq("report", "nothing", "--out", "x.html")
    assert missing.exit_code == 2
    assert not (tmp_path / "x.html").exists()


def test_a_study_is_removed_where_it_is_said_so(autoq, database):
    asked = autoq("remove", "demo")
    assert (asked.exit_code, asked.stdout) == (2, "")
    assert asked.stderr == "autoq: this removes study 'demo' with 9 trials for good; say so with --yes\n"
    with Store.open(database) as store:
        assert len(store.studies()) == 1
    assert autoq("remove", "demo", "--yes").stdout == "study 'demo' with 9 trials is removed\n"
    assert autoq("remove", "demo", "--yes").exit_code == 2
    assert autoq("studies").stdout.startswith("no studies yet")


@pytest.mark.parametrize(("typed", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_one_is_asked_first(database, tmp_path, typed, code):
    leading, following = pty.openpty()
    command = [sys.executable, "-c", "from autoq.cli import main; main()", "remove", "demo", "--db", str(database)]
    with subprocess.Popen(
        command, stdin=following, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.write(leading, typed)
        said, asked = process.communicate(timeout=200)
    os.close(leading)
    os.close(following)
    assert process.returncode == code, asked
    assert "Remove study 'demo' with 9 trials for good? [y/N]" in asked
    assert ("is removed" in said) == (code == 0)
    with Store.open(database) as store:
        assert len(store.studies()) == code


def test_a_database_is_copied_or_nothing_is_made(autoq, database, tmp_path):
    done = autoq("copy", "copied.db")
    assert (done.exit_code, done.stdout) == (0, "copied 9 trials of demo to 'copied.db'\n")
    shown = [autoq("frontier", "demo", "--json", "--db", db).stdout for db in (database, "copied.db")]
    assert json.loads(shown[0]) == json.loads(shown[1])
    before = sorted(path.name for path in tmp_path.iterdir())
    again = autoq("copy", "copied.db")
    assert (again.exit_code, "has studies already" in again.stderr) == (2, True)
    assert autoq("copy", "new.db", "dmeo").exit_code == 2
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE trials SET seconds = 7 WHERE number = 3")
    damaged = autoq("copy", "new.db")
    assert damaged.exit_code == 1
    assert damaged.stderr.endswith("copy what is whole with: autoq copy NEW --rescue\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "what was refused left nothing behind"
    rescued = autoq("copy", "new.db", "--rescue")
    assert (rescued.exit_code, rescued.stdout) == (0, "copied 9 trials of demo to 'new.db'\n")
    assert "trial 3" in rescued.stderr


def test_an_interrupt_is_a_word_and_130(autoq, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("autoq.cli.stored.reading", interrupted)
    done = autoq("studies")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "autoq: interrupted\n")
