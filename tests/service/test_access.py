"""Who may do what: every route of the application, whoever asks."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest

from autoq.service.auth import PUBLIC, PUBLIC_BELOW, Authenticate
from autoq.service.settings import Settings, is_loopback

BODIES = {
    "/api/v1/studies": {"spec": {"model": {"id": "demo:smollm2"}}},
    "/api/v1/specs:check": {"spec": {"model": {"id": "demo:smollm2"}}},
    "/api/v1/studies/{study}/refine": {"max": {"size_bytes": "90MB"}},
    "/api/v1/studies/{study}/resume": {"trials": 100},
    "/api/v1/studies/{study}/exports": {"trial": 3},
    "/api/v1/studies/{study}/trials/{number}/recover": {"steps": 3},
    "/api/v1/studies/{study}/trials/{number}/remark": {"note": "x"},
    "/api/v1/tokens": {"name": "x", "user": "eve", "role": "admin"},
    "/api/v1/session": {"token": "x"},
}
QUERY = {"diff": {"a": "1", "b": "2"}, "values": {"objective": "kl_nats_per_token"}}
SAFE = ("GET", "OPTIONS")


def ask(client, conftest, method, path, **values):
    query = QUERY.get(path.rpartition("/")[2]) if method == "GET" else None
    return client.request(
        method, conftest.address(path, **values), json=BODIES.get(path) if method not in SAFE else None, params=query
    )


@pytest.fixture
def conftest(request):
    """What `conftest.py` has besides fixtures."""
    (plugin,) = [p for p in request.config.pluginmanager.get_plugins() if getattr(p, "__file__", "") and str(
        p.__file__).endswith("tests/service/conftest.py")]  # fmt: skip
    return plugin


def closed(conftest, server):
    """The routes that are not for everybody."""
    found = conftest.routes(server.app)
    assert len(found) > 30
    return [(m, p) for m, p in found if p not in PUBLIC and not p.startswith(PUBLIC_BELOW)]


@pytest.mark.parametrize("who", [None, "wrong", "no token", "expired", "revoked"])
def test_nobody_is_let_in_without_a_valid_token(server, conftest, who):
    client = server.client(who)
    for method, path in closed(conftest, server):
        answer = ask(client, conftest, method, path)
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["message"].startswith("a valid token is needed")
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_another_users_study_is_not_there(server, conftest):
    before = server.store.study("theirs"), server.store.remarks.of(server.store.study("theirs").id)
    for who in ("ada-viewer", "ada-submitter"):
        client = server.client(who)
        for study in ("theirs", "nobodys", str(server.store.study("theirs").id), "neverwas"):
            for method, path in closed(conftest, server):
                if "{study}" not in path:
                    continue
                answer = ask(client, conftest, method, path, study=study)
                forbidden = who == "ada-viewer" and method not in SAFE
                assert answer.status_code == (403 if forbidden else 404), (method, path)
                if not forbidden:
                    assert answer.json()["error"]["message"] == f"no study {study!r}"
        for path in ("/api/v1/exports/2", "/api/v1/exports/2/download"):
            assert client.get(path).status_code == 404
    assert before == (server.store.study("theirs"), server.store.remarks.of(server.store.study("theirs").id))


def test_a_viewer_changes_nothing(server, conftest):
    before = server.store.feed.versions()
    client = server.client("ada-viewer")
    for method, path in closed(conftest, server):
        if method not in SAFE:
            assert ask(client, conftest, method, path).status_code == 403, (method, path)
    assert server.store.feed.versions() == before


def test_only_admins_have_tokens(server, conftest):
    for method, path in closed(conftest, server):
        if "/tokens" in path:
            assert ask(server.client("ada-submitter"), conftest, method, path).status_code == 403
    assert server.client("ada-admin").get("/api/v1/tokens").status_code == 200


def test_every_owner_sees_what_is_theirs_and_an_admin_all(server, conftest):
    for who, names in (
        ("ada-viewer", ["mine"]),
        ("ada-submitter", ["mine"]),
        ("bob-submitter", ["theirs"]),
        ("bob-admin", ["mine", "theirs", "nobodys"]),
    ):
        client = server.client(who)
        assert [study["study"] for study in client.get("/api/v1/studies?sort=created").json()["studies"]] == names
        assert sorted({export["study"] for export in client.get("/api/v1/exports").json()["exports"]}) == sorted(names)
        known = {worker["study"] for worker in client.get("/api/v1/workers").json()["workers"]}
        assert known - {None} == set(names)
        for study in names:
            for method, path in closed(conftest, server):
                if method == "GET" and "{study}" in path and path.startswith("/api/") and "events" not in path:
                    answer = ask(client, conftest, method, path, study=study)
                    assert answer.status_code == 200 or "/figures/" in path, (path, answer.text)


def test_what_everybody_may_ask_says_nothing(server):
    client = server.client()
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/api/v1/session").json() == {"user": None, "role": None, "open": False}
    assert set(client.get("/readyz").json()) == {"ready", "database", "schema_current", "scheduler"}


def test_a_browser_is_led_to_the_login_page(server):
    answer = server.client().get("/studies/mine", headers={"Accept": "text/html"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/studies/mine")


def test_a_session_holds_the_token_where_no_script_reads_it(server):
    client = server.client()
    refused = client.post("/api/v1/session", json={"token": server.secrets["revoked"]})
    assert refused.status_code == 401
    begun = client.post("/api/v1/session", json={"token": server.secrets["ada-submitter"]})
    assert begun.json() == {"user": "ada", "role": "submitter", "open": False}
    cookie = begun.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Secure" not in cookie
    assert [study["study"] for study in client.get("/api/v1/studies").json()["studies"]] == ["mine"]
    assert client.get("/api/v1/session").json()["user"] == "ada"
    assert "Max-Age=0" in client.delete("/api/v1/session").headers["set-cookie"]
    assert client.get("/api/v1/studies").status_code == 401


def test_who_asks_at_once_shares_a_look_at_the_database_that_begins_after_all_have_asked(server, in_loop):
    looks, gate = [], threading.Event()

    class Slow(Authenticate):
        def find(self, secret):
            found = super().find(secret)
            looks.append(secret)
            gate.wait(60)  # what was found is old by the time that it is told
            return found

    door = Slow(None, server.app.state.settings, server.store)
    secret, token = server.store.accounts.create("short", "ada", "submitter")

    async def all_at_once():
        early = asyncio.create_task(door.ask(secret))
        while not looks:
            await asyncio.sleep(0)
        others = [asyncio.create_task(door.ask(each)) for each in ("aq_wrong", None)]
        late = [asyncio.create_task(door.ask(secret)) for _ in range(50)]
        await asyncio.sleep(0)  # all have asked
        server.store.accounts.revoke(token.id)
        late[0].cancel()  # a client that goes away
        gate.set()
        return await early, await asyncio.gather(*others), await asyncio.gather(*late[1:])

    early, others, late = in_loop(all_at_once())
    assert early.user == "ada"
    assert others == [None, None]
    assert set(late) == {None}, "a token that was revoked before"
    assert looks.count(secret) == 2
    assert door._next == {}


def test_a_header_goes_before_a_cookie(server):
    client = server.client("wrong", cookies={"autoq": server.secrets["ada-admin"]})
    assert client.get("/api/v1/studies").status_code == 401


def test_an_expired_session_ends_with_its_token(server):
    secret, record = server.store.accounts.create("short", "ada", "viewer", timedelta(days=1))
    client = server.client(cookies={"autoq": secret})
    assert client.get("/api/v1/studies").status_code == 200
    server.store.accounts.revoke(record.id)
    assert client.get("/api/v1/studies").status_code == 401


def test_a_token_is_told_once_and_never_again(server):
    admin = server.client("ada-admin")
    made = admin.post("/api/v1/tokens", json={"name": "ci", "user": "eve", "role": "submitter", "days": 2})
    assert made.status_code == 201
    secret = made.json()["token"]
    assert secret not in admin.get("/api/v1/tokens").text
    with server.store._database.reading() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM tokens").all()
    assert secret not in repr(rows)
    as_eve = {"Authorization": f"Bearer {secret}"}
    assert server.client().get("/api/v1/session", headers=as_eve).json()["user"] == "eve"
    assert admin.delete(f"/api/v1/tokens/{made.json()['id']}").json()["valid"] is False
    assert server.client().get("/api/v1/studies", headers=as_eve).status_code == 401
    assert admin.delete("/api/v1/tokens/99").status_code == 404


def test_an_open_server_closes_with_its_first_token(open_server):
    client = open_server.client()
    assert client.get("/api/v1/session").json() == {"user": None, "role": "admin", "open": True}
    assert len(client.get("/api/v1/studies").json()["studies"]) == 3
    secret, record = open_server.store.accounts.create("first", "ada", "admin")
    assert client.get("/api/v1/studies").status_code == 401
    assert client.get("/api/v1/studies", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    open_server.store.accounts.revoke(record.id)
    assert client.get("/api/v1/studies").status_code == 401, "it does not open again"


def test_only_loopback_is_ever_open(store):
    from starlette.testclient import TestClient

    from autoq.service.app import create_app

    app = create_app(store, Settings(host="0.0.0.0", hosts=("testserver",)))
    assert TestClient(app).get("/api/v1/studies").status_code == 401


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_loopback(host, loopback):
    assert is_loopback(host) is loopback
