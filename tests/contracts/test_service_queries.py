"""Every question that the API asks of a database is answered by an index, however many trials there are.

The plans are the databases' own, of the very statements that the routes issue: 30,000 trials of 60 studies, of which
each address concerns one.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from autoq.assignment import Assignment
from autoq.layer import Layer
from autoq.scheme import parse_scheme
from autoq.service.app import create_app
from autoq.service.settings import Limits, Settings
from autoq.spec import build_spec
from autoq.store import Prepared
from autoq.store import models as m
from autoq.store.packing import pack, pack_values
from autoq.store.queue_submissions import Submission

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
STUDIES, TRIALS = 60, 500
LARGE = ("trials", "measurements", "assignments", "token_values", "frontier")
VALUES = {"study": "s7", "number": "3", "export": "1", "name": "frontier", "digest": "0"}
QUERY = {"diff": {"a": "1", "b": "2"}, "values": {"objective": "kl_nats_per_token"}}
# They ask of all studies together by their nature, once in a while: a count of all trials for Prometheus.
WHOLE = {"/metrics"}


@pytest.fixture
def large(store):
    """The store with 60 studies of 500 trials, 20 of each on its frontier."""
    layers = {name: vars(Layer(name, "linear", 64, 64, 2)) for name in ("a", "b")}
    tables = {"layers": layers, "sensitivity": {"a": {"rtn-int4-g64": 0.1}}}
    specs = [build_spec({"model": {"id": "tiny"}, "name": f"s{study}"}) for study in range(STUDIES)]
    store.queue.submit_all([Submission("ada", None, "f", spec, Prepared(OBJECTIVES, tables)) for spec in specs])
    texts = [f"rtn-int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]
    known = [Assignment({"a": parse_scheme(a), "b": parse_scheme(b)}) for a in texts for b in texts]
    with store._database.writing() as connection:
        connection.execute(sa.insert(m.assignments), [{"hash": each.hash, "body": pack(each)} for each in known])
        hashes = ", ".join(f"({i}, '{each.hash}')" for i, each in enumerate(known))
        series = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
        insert = f"""
            INSERT INTO trials (id, study_id, number, state, origin, baseline, assignment, attempt, changed, feasible,
                                sampler_attrs, created_at, finished_at, seconds, worker)
            {series}, h(j, hash) AS (VALUES {hashes})
            SELECT i + 1, i / {TRIALS} + 1, i % {TRIALS}, 'complete', CASE WHEN i % {TRIALS} < 2 THEN 'baseline'
                   ELSE 'sampler' END, CASE WHEN i % {TRIALS} < 2 THEN 'uniform-int' || (4 + i % {TRIALS}) END, h.hash,
                   1, i % {TRIALS} + 2, TRUE, '{{}}', :now, :now, 1.0, 'w'
            FROM n JOIN h ON h.j = n.i % {len(known)}"""
        now = sa.bindparam("now", datetime.now(UTC), m.Moment())
        connection.execute(sa.text(insert).bindparams(now, last=STUDIES * TRIALS - 1))
        for name, unit, _ in OBJECTIVES:
            connection.execute(
                sa.text(f"""
                INSERT INTO measurements (trial_id, objective, part, kind, value, stderr, unit, n, device, detail)
                SELECT id, '{name}', 'search', 'measured', 1.0 + (id * 7919) % 1000, 0.1, '{unit}', 100, 'cpu', '{{}}'
                FROM trials""")
            )
        connection.execute(
            sa.text(f"""
            INSERT INTO frontier (study_id, trial_id, point) SELECT study_id, id, '[' || number || ', 1]' FROM trials
            WHERE number % {TRIALS // 20} = 3""")
        )
        body = sa.bindparam("body", pack_values(np.zeros((1, 4), np.float32))["body"])
        values = "SELECT trial_id, 'kl_nats_per_token', 'search', 1, 4, :body FROM frontier"
        columns = "trial_id, objective, part, windows, tokens, body"
        connection.execute(sa.text(f"INSERT INTO token_values ({columns}) {values}").bindparams(body))
        connection.execute(sa.text("UPDATE studies SET changes = 1000"))
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT setval(pg_get_serial_sequence('trials', 'id'), max(id)) FROM trials"))
    with store._database._engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE")
    return store


def scans(connection, statement, parameters):
    """The large tables that the database reads from end to end for a statement."""
    if connection.dialect.name == "sqlite":
        lines = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        return [line for line in lines if re.match(rf"SCAN ({'|'.join(LARGE)})\b", line)]
    # Tables as small as these PostgreSQL reads from end to end because it is cheaper. Whether it has to is asked here.
    for other in ("seqscan", "mergejoin", "hashjoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{other} = off")
    (row,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
    waiting, found = [(row[0] if isinstance(row[0], list) else json.loads(row[0]))[0]["Plan"]], []
    while waiting:
        node = waiting.pop()
        waiting += node.get("Plans", ())
        whole = node["Node Type"] == "Seq Scan" or ("Index" in node["Node Type"] and "Index Cond" not in node)
        if whole and node.get("Relation Name") in LARGE:
            found.append(f"{node['Node Type']} of {node['Relation Name']}")
    return found


@pytest.fixture
def asked(large):
    """The SELECTs that are sent to the database, as it gets them."""
    found = {}

    def note(connection, cursor, statement, parameters, context, executemany):
        if statement.lstrip().upper().startswith(("SELECT", "WITH")):
            found[statement] = parameters

    engine = large._database._engine
    sa.event.listen(engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(engine, "before_cursor_execute", note)


def plans(store, asked):
    with store._database._engine.connect() as connection:
        return {statement: found for statement, parameters in list(asked.items())
                if (found := scans(connection, statement, parameters))}  # fmt: skip


def test_a_scan_is_seen(large, asked):
    with large._database.reading() as connection:
        connection.execute(sa.select(m.trials.c.id).where(m.trials.c.seconds > 0.5)).first()
        connection.execute(sa.select(sa.func.sum(m.measurements.c.value))).scalar()
    assert len(plans(large, asked)) == 2


def test_no_route_reads_all_trials_of_all_studies(large, asked):
    limits = Limits(requests_per_second=1e6, burst=10**6)
    app = create_app(large, Settings(limits=limits, hosts=("*",)))
    client, seen = TestClient(app, raise_server_exceptions=True), 0
    paths = [p for route in app.routes for each in _contexts(route) if "GET" in each.methods for p in [each.path]]
    for path in paths:
        if path in WHOLE or path.endswith("/events"):
            continue
        filled = re.sub(r"\{(\w+)(:\w+)?\}", lambda found: VALUES.get(found[1], "1"), path)
        for query in ({}, *({"state": "failed"}, {"limit": "10", "after": "100"})[: 2 * path.endswith("/trials")]):
            answer = client.get(filled, params=QUERY.get(path.rpartition("/")[2], query))
            assert answer.status_code < 500 or path == "/readyz" or path.endswith("/offer"), (path, answer.text)
        seen += 1
    assert seen > 30
    assert len(asked) > 30
    assert plans(large, asked) == {}


def test_neither_do_those_who_follow_or_write(large, asked):
    study = large.study("s7")
    large.feed.chunk(study.id, 480, 100)
    large.feed.versions([study.id])
    large.find(study.id, Assignment({"a": parse_scheme("rtn-int4-g64"), "b": parse_scheme("rtn-int8-g64")}).hash)
    large.remarks.put(study.id, 3, "note", [], None)
    trial = large.start_trial(study.id, TRIALS, Assignment({"a": parse_scheme("nf4-g64")}), "sampler")
    assert large.fail_trial(trial.id, 1, "NotFinite", "x", "t", 0.1, "w")
    assert plans(large, asked) == {}


def _contexts(route):
    within = getattr(route, "effective_route_contexts", None)
    return [route] if within is None else list(within())
