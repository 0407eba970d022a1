"""Malformed specs and requests, on every database: 4xx with a line that names the field, and no study of it."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from autoq.errors import BadInput
from autoq.scheme import parse_scheme
from autoq.service.app import create_app
from autoq.service.settings import Limits, Settings
from autoq.store import Prepared

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]
VALID = {
    "model": {"id": "demo:smollm2", "dtype": "bfloat16"},
    "name": "valid",
    "data": {"source": "python-docs", "search_tokens": 2048},
    "target": {"name": "torch-cpu", "batch_size": 1},
    "space": {"methods": ["rtn"], "bits": [4, 8], "group_size": [64]},
    "objectives": ["kl_nats_per_token", "size_bytes"],
    "constraints": {"size_bytes": {"max": "120MB"}},
    "sampler": {"name": "frontier", "seed": 0},
    "budget": {"trials": 48, "wall_time": "30m"},
    "workers": {"executor": "local", "count": 1},
    "bank": {"disk": "20GB"},
}
# The databases take no NUL, and JSON no half characters: those are refused before anything is looked at.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | TEXT
TREES = st.lists(SCALARS, min_size=1, max_size=3) | st.dictionaries(TEXT, SCALARS, min_size=1, max_size=3)


def no_name(*choices):
    return TREES | st.booleans() | st.integers() | TEXT.filter(lambda text: text not in choices)


def no_scheme(text):
    try:
        parse_scheme(text)
    except BadInput:
        return True
    return False


NO_COUNT = TREES | st.booleans() | st.none() | TEXT | st.integers(max_value=0) | st.just(2**31) | st.just(1.5)
NO_TIME = (
    TREES
    | st.booleans()
    | st.floats(-1e9, 0)
    | st.integers(max_value=0)
    | TEXT.filter(lambda t: t[-1:] not in set("smhd"))
)
WRONG = {
    "model": TREES | SCALARS.filter(lambda v: not isinstance(v, dict)),
    "model.id": TREES | st.none() | st.integers() | st.just("") | st.just("x" * 5000),
    "model.dtype": no_name("bfloat16", "float32", "float16"),
    "name": TREES | st.none() | st.from_regex(r"\A[^A-Za-z0-9]", fullmatch=False).filter(lambda t: "\0" not in t)
    | st.just("a" * 101),
    "data": st.integers() | TEXT | st.lists(SCALARS),
    "data.search_tokens": NO_COUNT,
    "data.seed": TREES | st.integers(max_value=-1) | st.just(2**32) | TEXT | st.none(),
    "target.name": no_name("torch-cpu", "llama-cpp"),
    "target.threads": NO_COUNT.filter(lambda v: v is not None) | st.just(1025),
    "space.bits": st.lists(st.integers(17) | st.integers(max_value=1) | TEXT, min_size=1, max_size=3) | TEXT,
    "space.schemes": st.lists(TEXT.filter(no_scheme), min_size=1, max_size=3) | st.integers() | TEXT,
    "space.kinds": st.lists(no_name("linear", "embedding", "head", "router"), min_size=1, max_size=2),
    "objectives": st.lists(TEXT.filter(lambda t: "_" not in t), max_size=3) | st.integers() | TEXT,
    "constraints": st.dictionaries(TEXT.filter(lambda t: "_" not in t), SCALARS, min_size=1) | st.integers() | TEXT,
    "constraints.size_bytes": st.dictionaries(TEXT, SCALARS, min_size=1, max_size=2).filter(
        lambda d: not d.keys() & {"min", "max"}
    )
    | st.just({})
    | st.just({"min": 2, "max": 1}),
    "sampler.name": no_name("frontier", "random", "tpe", "nsga2"),
    "sampler.seed": TREES | TEXT | st.integers(max_value=-1) | st.just(2**32) | st.none(),
    "sampler.options": st.dictionaries(TEXT, TREES, min_size=1, max_size=2) | st.integers() | TEXT,
    "budget.trials": NO_COUNT,
    "budget.wall_time": NO_TIME,
    "budget.stop_confidence": st.floats(1.0, 9.0) | st.floats(-9.0, 0.5) | st.booleans() | TEXT,
    "workers.executor": no_name("local", "ray"),
    "workers.count": NO_COUNT | st.integers(2, 100),
    "bank.disk": TREES | st.booleans() | st.none() | st.integers(max_value=-1) | st.just("20Gb") | st.just("twenty"),
    "recipes": st.lists(st.integers() | st.just(""), min_size=1, max_size=2) | st.integers() | TEXT,
}  # fmt: skip
SECTIONS = ("", "model", "data", "target", "space", "sampler", "budget", "workers", "bank")


@st.composite
def malformed_specs(draw):
    """A spec with one mistake, and the section and the key that it is in."""
    spec = copy.deepcopy(VALID)
    if draw(st.booleans()):
        path = draw(st.sampled_from(sorted(WRONG)))
        *parents, key = path.split(".")
        node = spec
        for parent in parents:
            node = node[parent]
        node[key] = draw(WRONG[path])
        if path.startswith("space."):
            spec["space"] = {key: node[key]}
    else:
        section = draw(st.sampled_from(SECTIONS))
        key = draw(TEXT.filter(lambda text: text not in "name report tasks" and "_" not in text))
        path = f"{section}.{key}" if section else key
        (spec[section] if section else spec)[key] = draw(SCALARS | TREES)
        known = {"", "id", "dtype", "data", "model", "bits"}
        if key in known or key in spec.get("space", {}):
            path, spec = "model", {**spec, "model": 3}
    return path.partition(".")[0], spec


def holding(**fields):
    """A body of these fields, each a strategy or what it is always."""
    made = {name: f if isinstance(f, st.SearchStrategy) else st.just(f) for name, f in fields.items()}
    return st.fixed_dictionaries(made)


NO_MAPPING = TREES.filter(lambda tree: not isinstance(tree, dict))
NO_PRIORITY = TREES | TEXT | st.none() | st.booleans() | st.integers(101) | st.integers(max_value=-101)
NO_NUMBER = TREES | TEXT | st.booleans() | st.integers(max_value=0) | st.just(2**31) | st.just(1.5)
NO_TRIAL = TREES | st.booleans() | st.none() | st.integers(max_value=-1)
NO_USER = TREES | st.from_regex(r"\A[^A-Za-z0-9]").filter(lambda text: "\0" not in text)
NO_YAML = ["a: &x 1", "!!python/object:os.system {}", "{", "a: 1\na: 2", "[" * 50, "2024-99-99", "", "- a"]
SUBMIT, THERE = "/api/v1/studies", "/api/v1/studies/there"
OTHERS = st.dictionaries(TEXT.filter(lambda t: t not in ("spec", "yaml", "priority")), SCALARS, min_size=1)
# method, address, body, the field that the answer names
REQUESTS = [
    ("POST", SUBMIT, st.just({}), "spec"),
    ("POST", SUBMIT, holding(spec=VALID, yaml="model: {id: x}"), "spec"),
    ("POST", SUBMIT, holding(spec=NO_MAPPING), "spec"),
    ("POST", SUBMIT, holding(spec=VALID, priority=NO_PRIORITY), "priority"),
    ("POST", SUBMIT, NO_MAPPING, None),
    ("POST", SUBMIT, OTHERS, None),
    ("POST", SUBMIT, holding(yaml=st.sampled_from(NO_YAML)), None),
    ("POST", f"{THERE}/resume", holding(trials=NO_NUMBER), "trials"),
    ("POST", f"{THERE}/refine", holding(max=st.dictionaries(TEXT, SCALARS, min_size=1)), None),
    ("POST", f"{THERE}/refine", holding(max={"size_bytes": "90MB"}, n=NO_NUMBER | st.none() | st.integers(65)), "n"),
    ("POST", f"{THERE}/trials/0/recover", holding(steps=NO_NUMBER | st.none()), "steps"),
    ("POST", f"{THERE}/trials/0/recover", holding(steps=3, how=no_name("model", "blocks")), "how"),
    ("POST", f"{THERE}/exports", holding(trial=NO_TRIAL), "trial"),
    ("POST", f"{THERE}/exports", holding(trial=TEXT), None),
    (
        "PUT",
        f"{THERE}/trials/0/remark",
        holding(tags=NO_MAPPING.map(lambda tree: [tree]) | TEXT),
        "tags",
    ),
    ("PUT", f"{THERE}/trials/0/remark", holding(note=TREES | st.integers()), "note"),
    ("POST", "/api/v1/tokens", holding(name="x", user="x", role=no_name("viewer", "submitter", "admin")), "role"),
    ("POST", "/api/v1/tokens", holding(name="x", user=NO_USER, role="admin"), "user"),
]


class Desk:
    def known(self, spec):
        return None

    async def prepare(self, spec):
        raise AssertionError(f"a malformed spec came so far: {spec!r}")

    async def offer(self, *_):
        raise AssertionError


@pytest.fixture
def client(store):
    from autoq.spec import build_spec

    store.queue.submit(None, None, "x", build_spec({**VALID, "name": "there"}), Prepared(OBJECTIVES, {}))
    app = create_app(store, Settings(limits=Limits(requests_per_second=1e6, burst=10**6)), Desk())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


MANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def told(answer):
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 2000
    return error


@settings(max_examples=600, **MANY)
@given(malformed_specs())
def test_a_malformed_spec_is_refused_by_field(store, client, made):
    section, spec = made
    answer = client.post("/api/v1/studies", json={"spec": spec}, headers={"Idempotency-Key": "k"})
    error = told(answer)
    assert answer.status_code == 422
    assert error["field"].partition(".")[0] == section, (error, spec)
    assert list(store.feed.versions().values()) == [1]


@settings(max_examples=400, **MANY)
@given(st.sampled_from(REQUESTS).flatmap(lambda one: st.tuples(st.just(one), one[2])))
def test_a_malformed_request_is_refused(store, client, made):
    (method, path, _, field), body = made
    error = told(client.request(method, path, json=body))
    if field is not None:
        assert error["field"].partition(".")[0] == field, (error, body)
    assert list(store.feed.versions().values()) == [1]
    assert not store.accounts.any()


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 129])
def test_a_malformed_key_is_refused(store, client, key):
    answer = client.post("/api/v1/studies", json={"spec": VALID}, headers={"Idempotency-Key": key})
    assert told(answer)["field"] == "Idempotency-Key"
    assert len(store.feed.versions()) == 1
