"""What every database behind the store must do with stopped trials, values per token and shared tables."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import NotFound, StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store.models import metadata

SPEC = build_spec({"model": {"id": "tiny"}, "name": "demo"})
KL = ("kl_nats_per_token", "nats/token", "minimize")
SIZE = ("size_bytes", "bytes", "minimize")
KEPT = Assignment({"up": parse_scheme("keep")})


def searched(n, detail):
    return [
        Measurement("kl_nats_per_token", 2.0, "nats/token", "measured", "search", n=n, detail=detail),
        Measurement("size_bytes", 1.0, "bytes", "computed", "search"),
    ]


def test_a_stopped_trial_keeps_what_was_measured_and_is_never_on_the_frontier(store):
    study = store.create_study(SPEC, [KL, SIZE])
    trial = store.start_trial(study.id, 0, KEPT, "sampler")
    detail = {"of": 2048, "rival": 3, "estimate": 2.5}
    found = searched(512, detail)
    assert not store.stop_trial(trial.id, 2, found, {}, 1.0, "w"), "a late result"
    assert store.stop_trial(trial.id, 1, found, {"size_bytes": -1.0}, 1.0, "w")
    stopped = store.trial(study.id, 0)
    assert (stopped.state, stopped.feasible, stopped.on_frontier) == ("stopped", None, False)
    assert (stopped.values(["kl_nats_per_token"]), stopped.violations) == ((2.0,), {"size_bytes": -1.0})
    assert stopped.measurements["kl_nats_per_token", "search"].detail == detail
    assert store.frontier(study.id) == []
    assert store.recompute_frontier(study.id) == []
    assert store.studies()[0].stopped == 1
    assert [t.number for t in store.trials(study.id, states=["stopped"])] == [0]
    assert store.find(study.id, KEPT.hash).number == 0
    with pytest.raises(StoreError, match=r"^trial 0 of study 'demo' is stopped and cannot run again$"):
        store.retry_trial(trial.id)
    with pytest.raises(StoreError, match=r"is not complete$"):
        store.add_measurements(trial.id, [dataclasses.replace(found[0], part="report")])


def test_values_per_token_come_and_go_with_their_measurement(store):
    study = store.create_study(SPEC, [KL, SIZE])
    trial = store.start_trial(study.id, 0, KEPT, "sampler")
    values = np.random.default_rng(0).exponential(size=(3, 8)).astype(np.float32)
    values[1, 2] = np.nan
    loss, size = searched(24, {})
    assert not store.finish_trial(trial.id, 2, [dataclasses.replace(loss, per_token=values), size], {}, 1.0, "late")
    assert store.token_values(study.id, 0, "kl_nats_per_token", "search") is None
    assert store.finish_trial(trial.id, 1, [dataclasses.replace(loss, per_token=values), size], {}, 1.0, "w")
    found = store.token_values(study.id, 0, "kl_nats_per_token", "search")
    assert found.dtype == np.float32
    assert np.allclose(found, values, rtol=2.0**-12, atol=0, equal_nan=True)
    for absent in (("size_bytes", "search"), ("kl_nats_per_token", "report")):
        assert store.token_values(study.id, 0, *absent) is None
    assert store.token_values(study.id, 1, "kl_nats_per_token", "search") is None

    report = dataclasses.replace(loss, part="report")
    store.add_measurements(trial.id, [dataclasses.replace(report, per_token=values[:1])])
    store.add_measurements(trial.id, [dataclasses.replace(report, per_token=values[1:])])
    found = store.token_values(study.id, 0, "kl_nats_per_token", "report")
    assert np.allclose(found, values[1:], rtol=2.0**-12, atol=0, equal_nan=True)
    store.add_measurements(trial.id, [report])
    assert store.token_values(study.id, 0, "kl_nats_per_token", "report") is None, "of an older measurement"
    with store._database.writing() as connection:
        connection.execute(sa.delete(metadata.tables["studies"]))
    with store._database.reading() as connection:
        assert connection.execute(sa.select(metadata.tables["token_values"])).all() == []


def test_tables_that_studies_share(store):
    assert (store.costs("a"), store.sensitivities("a")) == (None, None)
    store.put_costs("a", "cpu", {"latency": 1})
    store.put_sensitivities("a", {"up": {"rtn-int4-g64": 0.5}})
    store.put_sensitivities("a", {"up": {"rtn-int4-g64": 0.25}})
    assert store.sensitivities("a") == {"up": {"rtn-int4-g64": 0.25}}
    assert store.costs("a") == {"latency": 1}
    assert store.sensitivities("b") is None


def test_trials_as_rows_are_those_of_the_records(store):
    study = store.create_study(SPEC, [KL, SIZE])
    for number in range(4):
        chosen = Assignment({"up": parse_scheme(f"rtn-int{number + 2}-channel")})
        trial = store.start_trial(study.id, number, chosen, "sampler", None, {"frontier:predicted": 0.5})
        if number == 1:
            store.fail_trial(trial.id, 1, "ValueError", "no", "trace", 1.0, "w")
        elif number < 3:
            store.finish_trial(trial.id, 1, searched(512, {"of": 1}), {}, 1.0, "w")
    rows, measured = store.trial_columns(study.id)
    records = store.trials(study.id)
    told = [
        (
            *(t.id, t.number, t.state, t.origin, t.baseline, t.duplicate_of, t.feasible, t.on_frontier),
            *(t.created_at, t.finished_at, t.seconds, dict(t.sampler_attrs)),
        )
        for t in records
    ]
    assert [(*row[:-1], json.loads(row[-1])) for row in rows] == told
    values = [(v.objective, v.value, dict(v.detail)) for t in records for v in t.measurements.values()]
    assert [(row[1], row[4], json.loads(row[7])) for row in measured] == values
    assert [row[1] for row in store.trial_columns(study.id, after=0, limit=2)[0]] == [1, 2]
    assert store.trial_columns(study.id, changed_since=store.study(study.id).changes) == ([], [])
    with pytest.raises(NotFound):
        store.trial_columns(10**6)
