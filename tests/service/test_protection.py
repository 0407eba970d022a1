"""What is refused before any route sees it, and what every answer carries."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from autoq.errors import StoreError
from autoq.service.app import create_app
from autoq.service.limits import Bodies, Buckets, refuse_body
from autoq.service.settings import Limits, Settings

REMARK = "/api/v1/studies/mine/trials/3/remark"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(open_server):
    return open_server.client()


def test_every_answer_has_the_security_headers(client):
    for path in ("/healthz", "/api/v1/studies", "/nothing", "/api/v1/studies/mine/frontier"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["base-uri"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
    refused = client.get("/healthz", headers={"Host": "evil.example"})
    assert refused.status_code == 400
    assert "content-security-policy" in refused.headers


@pytest.mark.parametrize("host", ["localhost", "localhost:8800", "127.0.0.1:8800", "[::1]:8800", "LOCALHOST"])
def test_the_servers_own_names_are_known(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::2]", "a b"]
)
def test_another_name_is_refused(client, host):
    answer = client.get("/api/v1/studies", headers={"Host": host})
    assert answer.status_code == 400
    assert "--allow-host" in answer.json()["error"]["message"]


def test_names_are_added_by_settings(store):
    app = create_app(store, Settings(hosts=("autoq.example.org",)))
    assert TestClient(app, base_url="https://autoq.example.org").get("/healthz").status_code == 200
    assert TestClient(app, base_url="https://example.org").get("/healthz").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:9999"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:8800"},
    ],
)
def test_another_sites_page_changes_nothing(client, headers):
    for method, path in (("PUT", REMARK), ("POST", "/api/v1/studies/mine/resume"), ("POST", "/api/v1/studies")):
        answer = client.request(method, path, json={"note": "x"}, headers=headers)
        assert answer.status_code == 403
    assert client.get(REMARK).json()["note"] == "a good one"
    assert client.get("/api/v1/studies", headers=headers).status_code == 200, "reading is the browser's to guard"


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://localhost:8800"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}],
)
def test_our_own_page_and_programs_do(client, headers):
    assert client.put(REMARK, json={"note": "new"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json; charset=latin-1"],
)
def test_a_body_must_say_that_it_is_json(client, content_type):
    answer = client.put(REMARK, content=b'{"note": "x"}', headers={"Content-Type": content_type})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("body", "status", "fragment"),
    [
        (b"{", 400, "not valid JSON"),
        (b'{"note": NaN}', 400, "NaN is no number"),
        (b'{"note": "a", "note": "b"}', 400, "'note' stands twice"),
        (b'{"note": "\xff"}', 400, "not UTF-8"),
        (b'{"note": "\\u0000"}', 400, "a NUL"),
        (b'{"note": "\\ud800"}', 400, "half a character"),
        (b'{"\\udfff": 1}', 400, "half a character"),
        (b"[" * 100 + b"]" * 100, 400, "nested more than 32 deep"),
        (b"[" * 400_000, 400, "nested more than 32 deep"),
        (b'{"note": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (b'{"note": "' + b"x" * 1_000_000 + b'"}', 413, "1000000 bytes"),
        (b"", 422, "body: is required"),
        (b"null", 422, "must be a section"),
        (b"[]", 422, "must be a section"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(client, body, status, fragment):
    started = time.process_time()
    answer = client.put(REMARK, content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    assert fragment in answer.json()["error"]["message"]
    assert time.process_time() - started < 1
    assert client.get(REMARK).json()["note"] == "a good one"


def test_a_body_in_chunks_is_bounded_too(client, in_loop):
    """And no more of it is read than that takes."""
    assert client.put(REMARK, content=iter([b"x" * 65536] * 20), headers=JSON).status_code == 413
    asked, sent = [], []

    async def endless():
        asked.append(65536)
        return {"type": "http.request", "body": b"x" * 65536, "more_body": True}

    async def never(*_):
        raise AssertionError("no route sees it")

    async def ask():
        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "PUT", "headers": [(b"content-type", b"application/json")]}
        await asyncio.wait_for(Bodies(never, Settings())(scope, endless, send), 60)

    in_loop(ask())
    assert sent[0]["status"] == 413
    assert sum(asked) - 65536 <= Limits().body_bytes < sum(asked)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=30,
    )
)
def test_depth_is_that_of_the_parsed_tree(tree):
    def depth(node):
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    body = json.dumps(tree).encode()
    odd = "\\u0000" in body.decode() or any(f"\\ud{c}" in body.decode() for c in "89abcdef")
    limit = max(depth(tree), 1)
    exact = refuse_body(body, "application/json", Limits(json_depth=limit))
    assert exact is None or (odd and "deep" not in exact[1])
    if depth(tree) > 1:
        assert "deep" in refuse_body(body, "application/json", Limits(json_depth=limit - 1))[1]


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 250_000, b'"\\' * 250_000, b'{"a":"' * 80_000, b'[{"' * 160_000])
def test_no_body_takes_the_square_of_its_length(body):
    started = time.process_time()
    assert refuse_body(body, "application/json", Limits()) is not None
    assert time.process_time() - started < 20  # of its own; the square would take minutes


def test_many_equal_keys_take_no_time():
    body = json.dumps({str(i): i for i in range(60_000)})[:-1].encode() + b', "59999": 1}'
    started = time.process_time()
    assert "'59999' stands twice" in refuse_body(body, "application/json", Limits())[1]
    assert time.process_time() - started < 20  # of its own; the square would take minutes


def test_a_slow_body_is_given_up(in_loop):
    def body_after(seconds):
        async def receive():
            await asyncio.sleep(seconds)
            return {"type": "http.request", "body": b"{", "more_body": True}

        return receive

    async def never(*_):
        raise AssertionError("no route sees it")

    async def ask():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "PUT", "headers": [(b"content-type", b"application/json")]}
        bodies = Bodies(never, Settings(limits=Limits(body_seconds=0.1)))
        await asyncio.wait_for(bodies(scope, body_after(0.03), send), 5)
        return sent[0]["status"]

    assert in_loop(ask()) == 408


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 10), st.floats(0.5, 20))
def test_a_bucket_gives_its_burst_and_then_its_rate(waits, burst, rate):
    buckets, now, given_out = Buckets(rate, burst), 100.0, 0
    for wait in waits:
        now += wait
        if buckets.take("a", now) == 0:
            given_out += 1
        assert given_out <= burst + rate * (now - 100.0) + 1e-6
    after = buckets.take("b", now)
    assert after == 0, "another client has a bucket of its own"
    while (after := buckets.take("a", now)) == 0:
        pass
    assert buckets.take("a", now + after + 1e-6) == 0


def test_too_many_requests_are_told_when_to_come_back(store):
    app = create_app(store, Settings(limits=Limits(requests_per_second=0.001, burst=3)))
    client = TestClient(app, base_url="http://localhost")
    assert [client.get("/api/v1/session").status_code for _ in range(5)] == [200] * 3 + [429] * 2
    refused = client.get("/api/v1/session")
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == 200, "whether it lives can always be asked"


def test_full_buckets_are_forgotten():
    buckets = Buckets(1.0, 5)
    for client in range(10_001):
        buckets.take(str(client), float(client) / 1000)
    assert len(buckets._left) == 10_001
    buckets.take("more", 1000.0)
    assert len(buckets._left) == 1


def test_answers_are_compressed_for_those_who_take_it(client):
    plain = client.get("/api/v1/studies/mine/frontier", headers={"Accept-Encoding": "identity"})
    packed = client.get("/api/v1/studies/mine/frontier", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.content) / 3
    assert packed.json() == plain.json()
    assert packed.headers["etag"] == plain.headers["etag"][:-1] + '-gzip"'
    assert "Accept-Encoding" in packed.headers["vary"]
    for tag in (packed.headers["etag"], plain.headers["etag"]):
        again = client.get("/api/v1/studies/mine/frontier", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
    small = client.get("/healthz", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers
    assert gzip.decompress(gzip.compress(plain.content)) == plain.content


def test_a_bug_says_nothing_of_itself(open_server, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("secret /etc/passwd")

    monkeypatch.setattr(type(open_server.store.feed), "total", broken)
    with caplog.at_level(logging.ERROR):
        answer = open_server.client().get("/api/v1/studies")
    assert answer.status_code == 500
    assert answer.json() == {"error": {"message": "an internal error; the server's log has it"}}
    assert "content-security-policy" in answer.headers
    assert "secret /etc/passwd" in caplog.text


def test_a_database_out_of_reach_is_no_bug_and_names_nothing(open_server, monkeypatch):
    def broken(*_):
        raise StoreError("the database 'postgresql://u@host/secret' cannot be reached: nothing at /var/run")

    client = open_server.client()
    for name in ("total", "stamp", "ping"):
        monkeypatch.setattr(type(open_server.store.feed), name, broken)
    for path in ("/api/v1/studies", "/api/v1/studies/mine"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json() == {"error": {"message": "the database cannot be used at the moment"}}
        assert int(answer.headers["retry-after"]) > 0
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["database"]) == (503, False)
    monkeypatch.setattr(type(open_server.store.accounts), "any", broken)
    assert client.get("/api/v1/studies").status_code == 503, "in the middleware too"
    assert client.get("/healthz").status_code == 200


def test_tls_binds_the_cookie_to_the_host(store):
    app = create_app(store, Settings(tls=True))
    secret, _ = store.accounts.create("x", "ada", "viewer")
    answer = TestClient(app, base_url="https://localhost").post("/api/v1/session", json={"token": secret})
    assert answer.headers["set-cookie"].startswith("__Host-autoq=")
    assert "Secure" in answer.headers["set-cookie"]
    assert answer.headers["strict-transport-security"]
