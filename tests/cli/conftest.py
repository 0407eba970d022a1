"""A database with one study, filled by hand: numbers chosen so that every mark of the tables appears."""

import shutil

import pytest
from typer.testing import CliRunner

from autoq.assignment import Assignment
from autoq.cli import app
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import parse_spec
from autoq.store import Store

OBJECTIVES = [
    ("kl_nats_per_token", "nats/token", "minimize"),
    ("size_bytes", "bytes", "minimize"),
    ("latency_decode_ms", "ms", "minimize"),
]
LAYERS = ("model.layers.0.q_proj", "model.layers.0.down_proj", "model.layers.1.down_proj")


def mixed(*texts):
    return Assignment({name: parse_scheme(text) for name, text in zip(LAYERS, texts, strict=True)})


# number -> origin, baseline, schemes, (kl, stderr), bytes, predicted ms, (measured ms, stderr)
TRIALS = [
    ("baseline", "unquantized", ("keep", "keep", "keep"), (0.0, 0.0), 270e6, 30.0, (31.2, 0.3)),
    ("baseline", "uniform-int8", ("rtn-int8-channel-sym",) * 3, (0.004, 0.0002), 140e6, 18.0, (17.5, 0.1)),
    ("baseline", "uniform-int4", ("rtn-int4-g64",) * 3, (0.42, 0.01), 80e6, 12.0, (12.4, 0.1)),
    ("seed", None, ("rtn-int8-g64", "rtn-int4-g64", "rtn-int4-g64"), (0.17, 0.006), 80e6, 11.9, (12.3, 0.1)),
    ("sampler", None, ("rtn-int4-g64", "rtn-int8-g64", "rtn-int4-g64"), (0.172, 0.006), 79.8e6, 11.9, (12.3, 0.1)),
    ("sampler", None, ("rtn-int3-g64", "rtn-int4-g64", "rtn-int4-g64"), (0.61, 0.02), 72e6, 11.0, None),
    ("sampler", None, ("rtn-int3-g64", "rtn-int3-g64", "rtn-int8-g64"), (0.9, 0.03), 90e6, 13.0, None),
]


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """The filled database, made once and copied for each test."""
    path = tmp_path_factory.mktemp("filled") / "autoq.db"
    with Store.open(str(path)) as store:
        study = store.create_study(parse_spec("name: demo\nmodel: {id: some/model}"), OBJECTIVES)
        for number, (origin, baseline, schemes, kl, size, predicted, measured) in enumerate(TRIALS):
            trial = store.start_trial(study.id, number, mixed(*schemes), origin, baseline)
            searched = [
                Measurement("kl_nats_per_token", kl[0], "nats/token", "measured", "search", kl[1], 2048),
                Measurement("size_bytes", size, "bytes", "computed", "search"),
                Measurement("latency_decode_ms", predicted, "ms", "predicted", "search"),
            ]
            assert store.finish_trial(trial.id, 1, searched, {}, 1.5, "local")
            if measured is not None:
                reported = [
                    Measurement("kl_nats_per_token", kl[0], "nats/token", "measured", "report", kl[1], 8192),
                    Measurement("latency_decode_ms", measured[0], "ms", "measured", "report", measured[1], 20),
                ]
                store.add_measurements(trial.id, reported)
        again = mixed(*TRIALS[3][2])
        store.record_duplicate(study.id, 7, again, 3)
        failing = store.start_trial(study.id, 8, mixed("keep", "rtn-int4-g64", "keep"), "sampler")
        store.fail_trial(failing.id, 1, "NotFinite", "kl_nats_per_token is not a number", "trace", 0.1, "local")
        store.set_state(study.id, "finished")
    return path


@pytest.fixture
def database(filled, tmp_path, monkeypatch):
    """The path of a filled database, which is also the default one of the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOQ_DB", raising=False)
    return shutil.copy(filled, tmp_path / "autoq.db").as_posix()


@pytest.fixture
def autoq(database):
    """Run a command line in the folder of the database."""
    runner = CliRunner(env={"COLUMNS": None, "NO_COLOR": None, "FORCE_COLOR": None})
    return lambda *arguments: runner.invoke(app, list(arguments))
