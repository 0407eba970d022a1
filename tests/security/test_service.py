"""The server against those who have no token, a wrong one, or one of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest
from starlette.testclient import TestClient

from autoq.errors import LimitReached
from autoq.service.app import create_app
from autoq.service.limits import Buckets, network_of
from autoq.service.settings import Limits, Settings
from autoq.store import Store, accounts

BASE = "http://localhost:8800"
SPEC = {"model": {"id": "demo:smollm2"}, "name": "sent"}


def test_who_guesses_tokens_is_slowed_down(store):
    """Also where the guesses come in cookies or in the body of a sign-in."""
    store.accounts.create("x", "ada", "admin")
    app = create_app(store, Settings(limits=Limits(requests_per_second=0.001, burst=9)))
    client = TestClient(app, base_url=BASE)
    wrong = "autoq_" + "x" * 42
    seen = []
    for number in range(10):
        seen.append(client.get("/api/v1/studies", headers={"Authorization": f"Bearer {wrong}{number}"}).status_code)
        seen.append(client.post("/api/v1/session", json={"token": f"{wrong}{number}"}).status_code)
        seen.append(client.get("/", headers={"Cookie": f"autoq={wrong}{number}"}, follow_redirects=False).status_code)
    assert set(seen[:9]) == {401}
    assert set(seen[9:]) == {429}


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_one_client_has_a_whole_network_of_addresses(address, network):
    assert network_of(address) == network


def test_many_clients_make_no_request_slow(monkeypatch):
    buckets, looks = Buckets(0.001, 5), []
    monkeypatch.setattr(buckets, "_forget", lambda now: looks.append(now))
    for number in range(30_000):
        buckets.take(str(number), 100.0 + number / 30_000)
    assert len(looks) <= 2


def test_tokens_are_compared_in_constant_time(store, monkeypatch):
    secret, _ = store.accounts.create("x", "ada", "admin")
    compared = []
    real = accounts.hmac.compare_digest
    monkeypatch.setattr(accounts.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert store.accounts.find(secret) is not None
    assert len(compared) == 1
    assert all(secret not in side for side in compared[0])


def test_a_database_holds_no_token(store, tmp_path):
    secret, _ = store.accounts.create("x", "ada", "admin")
    store.close()
    for file in tmp_path.glob("autoq.db*"):
        assert secret.encode() not in file.read_bytes()


def test_one_token_leaves_streams_for_others(store, in_loop):
    app = create_app(store, Settings(limits=Limits(event_streams=10, event_streams_each=2)))
    hub = app.state.hub

    async def follow() -> None:
        study = store.study("mine").id
        mine = [hub.study(study, 0, token=1) for _ in range(3)]
        for stream in mine[:2]:
            await anext(stream)
        with pytest.raises(LimitReached, match="2 clients follow events with this token already"):
            await anext(mine[2])
        other = hub.study(study, 0, token=2)
        await anext(other)
        await mine[0].aclose()
        again = hub.study(study, 0, token=1)
        await anext(again)
        for stream in (mine[1], other, again):
            await stream.aclose()
        hub.close()
        assert hub.clients == 0
        assert not hub._each

    in_loop(follow())


def test_a_key_is_its_users_own(server):
    """The same idempotency key of another user is another submission, and tells nothing of the first one."""
    key = {"Idempotency-Key": "monday"}
    ada, bob = server.client("ada-submitter"), server.client("bob-submitter")
    first = ada.post("/api/v1/studies", json={"spec": SPEC}, headers=key).json()
    theirs = bob.post("/api/v1/studies", json={"spec": SPEC}, headers=key)
    assert theirs.status_code == 201
    assert theirs.json()["id"] != first["id"]
    other = bob.post(
        "/api/v1/studies", json={"spec": SPEC | {"name": "tuesday"}}, headers={"Idempotency-Key": "tuesday"}
    )
    again = ada.post("/api/v1/studies", json={"spec": SPEC}, headers={"Idempotency-Key": "tuesday"})
    assert (other.status_code, again.status_code) == (201, 201)  # no conflict with bob's
    assert ada.get(f"/api/v1/studies/{theirs.json()['id']}").status_code == 404


def test_ids_that_are_another_users_are_answered_as_ids_that_are_none(server):
    """Counting ids up finds nothing out."""
    client = server.client("ada-submitter")
    theirs = server.store.study("theirs").id
    exports = {e.id for e in server.store.queue.exports() if e.study_id == theirs}
    assert exports
    for path, known in (("studies/{}", theirs), ("studies/{}/frontier", theirs), *(("exports/{}", e) for e in exports)):
        there = client.get("/api/v1/" + path.format(known))
        nowhere = client.get("/api/v1/" + path.format(98765))
        assert there.status_code == nowhere.status_code == 404
        assert there.text.replace(str(known), "#") == nowhere.text.replace("98765", "#")
        assert set(there.headers) == set(nowhere.headers)


@pytest.mark.parametrize("name", ['a"b', "a\r\nX-Y: z", "a;b", "../x", "ä", "a b", "", "\u202ea", "-x", ".x"])
def test_no_name_breaks_out_of_a_header(server, name):
    """Names go into download headers, addresses and files; only those that can do no harm there are names."""
    answer = server.client("ada-submitter").post("/api/v1/studies", json={"spec": SPEC | {"name": name}})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "name"


def test_a_download_is_called_what_its_study_is(server, tmp_path):
    client = server.client("ada-submitter")
    (export,) = [e for e in server.store.queue.exports() if e.study == "mine"]
    folder = tmp_path / "exports" / str(export.id)
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    (folder / "link").symlink_to("/etc/passwd")
    server.store.queue.set_export(export.id, "finished", ("queued",), None, {})
    answer = client.get(f"/api/v1/exports/{export.id}/download")
    assert re.fullmatch(r'attachment; filename="[A-Za-z0-9._-]+\.tar"', answer.headers["content-disposition"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert b"link" not in answer.content
    assert b"root:" not in answer.content


def test_a_table_holds_no_formula(server):
    """What a spreadsheet opens: nothing in it can begin as a formula does."""
    from autoq.documents import to_csv

    study = server.store.study("mine")
    for line in to_csv(study, server.store.trials(study.id)).splitlines():
        for cell in line.split(","):
            number = re.fullmatch(r"-?[0-9.]+(e[+-]?[0-9]+)?", cell)
            assert number or not re.match(r"[=+\-@\t\r]", cell), cell


def test_an_export_card_takes_nothing_from_a_models_name():
    from autoq.shipping.card import _PLAIN

    for name in ("demo:smollm2", "HuggingFaceTB/SmolLM2-135M", "/srv/models/x"):
        assert _PLAIN.fullmatch(name)
    for name in ("x\ntags: [evil]", "a: b", "[x]", "*x", "!tag", "&x", "{x}", "x #y", "'"):
        assert not _PLAIN.fullmatch(name)  # and is written as a JSON text, which YAML reads as one
        assert "\n" not in json.dumps(name)


SECRETS = {
    "HF_TOKEN": "hf_" + "s" * 30,
    "AUTOQ_TOKEN": "autoq_" + "s" * 43,
    "RAY_AUTH_TOKEN": "s" * 64,
    "AUTOQ_OWN_PASSWORD": "correct-horse-battery",
}


def test_no_secret_of_a_server_is_seen_from_outside(serve, monkeypatch, tmp_path):
    """Not in command lines of its processes, its log, answers, metrics or files, nor in a copy of its memory."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    process = serve()
    family = [psutil.Process(process.process.pid)]
    family += family[0].children(recursive=True)
    assert len(family) > 1  # it has started what answers heavy questions
    with Store.open(str(tmp_path / "autoq.db")) as store:
        token, _ = store.accounts.create("x", "ada", "admin")
    secrets = [*SECRETS.values(), token]
    seen = [" ".join(each.cmdline()) for each in family]
    for each in family:
        limits = Path(f"/proc/{each.pid}/limits").read_text()
        assert re.search(r"Max core file size\s+0\s", limits)
    headers = {"Authorization": f"Bearer {token}"}
    for path in (
        "studies",
        "studies/mine/trials/8",
        "studies/%00",
        "exports/1",
        "tokens",
        f"studies/{token}?x={token}",
    ):
        if token in path:  # what is sent is told again to who has sent it, and to nobody else
            httpx.get(f"{process.url}/api/v1/{path}", headers=headers)
            continue
        answer = httpx.get(f"{process.url}/api/v1/{path}", headers=headers)
        seen += [answer.text, str(answer.headers)]
    seen.append(httpx.get(f"{process.url}/metrics", headers=headers).text)
    seen.append(httpx.post(f"{process.url}/api/v1/studies", headers=headers, content=b"{").text)
    _, said = process.stop()
    seen.append(said)
    seen += [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    for secret in secrets:
        assert not [text[:300] for text in seen if secret in text]


def test_a_password_on_the_command_line_is_warned_of(capsys):
    from autoq.cli.app import _warn_of_passwords

    _warn_of_passwords(["serve", "--db", "postgresql+psycopg://ada:hunter2@db/autoq"])
    told = capsys.readouterr().err
    assert "AUTOQ_DB" in told
    assert "hunter2" not in told
    for harmless in ("autoq.db", "postgresql+psycopg://db/autoq", "postgresql://ada@db/autoq", "x://[", "sqlite:///x"):
        _warn_of_passwords(["serve", f"--db={harmless}"])
    _warn_of_passwords([])
    assert capsys.readouterr().err == ""


def test_what_was_written_is_in_no_error_of_the_database(store, caplog):
    """SQLAlchemy would tell the values of a statement that fails."""
    import sqlalchemy as sa

    from autoq.errors import StoreError

    with pytest.raises(StoreError) as refused, store._database.writing() as connection:
        connection.execute(sa.text("INSERT INTO nowhere VALUES (:x)"), {"x": "hunter2"})
    shown: BaseException | None = refused.value
    while shown is not None:
        assert "hunter2" not in str(shown)
        shown = shown.__cause__


PATHS = (
    "/api/v1/studies", "/api/v1/studies/mine", "/api/v1/studies/mine/trials", "/api/v1/studies/mine/frontier",
    "/api/v1/studies/mine/pick", "/api/v1/studies/mine/diff", "/api/v1/studies/mine/trials/3",
    "/api/v1/studies/mine/trials/3/assignment", "/api/v1/studies/mine/trials/3/remark", "/api/v1/studies/mine/refine",
    "/api/v1/studies/mine/trials/3/sequential", "/api/v1/studies/mine/trials/3/recover",
    "/api/v1/studies/mine/resume", "/api/v1/studies/mine/cancel", "/api/v1/studies/mine/exports",
    "/api/v1/studies/mine/sensitivity", "/api/v1/studies/mine/figures/frontier", "/api/v1/specs:check",
    "/api/v1/tokens", "/api/v1/tokens/1", "/api/v1/session", "/api/v1/exports/1", "/api/v1/exports/1/download",
    "/studies/mine", "/studies/mine/trials/3", "/studies/mine/diff", "/compare", "/static/0/autoq.css", "/login",
    "/metrics", "/readyz",
)  # fmt: skip
QUERIES = (
    "max", "min", "best", "a", "b", "limit", "after", "cursor", "sort", "state", "since", "objective", "assignments",
    "studies", "next", "x", "y", "colour", "trials", "trial", "part", "owner", "search", "format",
)  # fmt: skip
BODY = {
    "spec": SPEC, "priority": 0, "trials": 100, "trial": 3, "target": "gguf", "note": "x", "tags": ["a"],
    "max": {}, "min": {}, "best": "kl_nats_per_token", "n": 1, "name": "x",
    "user": "eve", "role": "viewer", "days": 1, "token": "x", "deep": False,
}  # fmt: skip


def test_requests(mutations, rounds, server):
    """Anything that is sent is answered, and never as a failure of the server's own."""
    broken = mutations.Mutations(7)
    r, clients = broken.random, [server.client(who) for who in (None, "ada-viewer", "ada-submitter", "ada-admin")]
    weights = (1, 2, 4, 3)
    for _ in range(rounds(300, 8_000)):
        path = r.choice(PATHS)
        if r.random() < 0.5:
            path = "/".join(
                r.choice((part, str(broken.value()))) if part and r.random() < 0.3 else part for part in path.split("/")
            )
        query = {r.choice(QUERIES): str(broken.value())[:2000] for _ in range(r.choice((0, 0, 1, 2)))}
        headers = {}
        if r.random() < 0.2:
            name = r.choice(
                ("Last-Event-ID", "If-None-Match", "Idempotency-Key", "Accept", "Cookie", "Origin", "Range")
            )
            headers[name] = "".join(c for c in str(broken.value()) if c.isprintable() and c.isascii())[:2000]
        method = r.choice(("GET", "GET", "GET", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"))
        if method == "DELETE" and "/tokens" in path:
            continue  # or nobody is left to ask
        body = None
        if method not in ("GET", "HEAD", "OPTIONS", "TRACE"):
            some = {key: BODY[key] for key in r.sample(sorted(BODY), r.choice((1, 2, 3)))}
            body = broken.json(some).encode("utf-8", "replace")
            headers.setdefault("Content-Type", "application/json")
        (client,) = r.choices(clients, weights)
        shown = repr((method, path, query, headers, body))[:3000]
        # What is no address at all is the client's to refuse.
        address = quote(path.encode("utf-8", "replace"), safe="/%:")
        answer = client.request(
            method, "/" + address.lstrip("/"), headers=headers, content=body,
            params={k: v.encode("utf-8", "replace").decode() for k, v in query.items()}, follow_redirects=False,
        )  # fmt: skip
        assert answer.status_code < 500, shown
        if answer.status_code >= 400 and answer.content and "json" in answer.headers["content-type"]:
            told = answer.json()["error"]["message"]
            assert "\n" not in told, shown
            assert len(told) < 5000, shown
