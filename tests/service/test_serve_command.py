"""`autoq serve` and `autoq token`: what it refuses, what it says, how it ends."""

from __future__ import annotations

import json
import shutil
import socket

import httpx
import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.service.serving import listen
from autoq.store import Store


@pytest.fixture
def autoq(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOQ_DB", raising=False)
    shutil.copy(template, tmp_path / "autoq.db")

    def run(*arguments):
        return CliRunner().invoke(app, list(arguments))

    return run


def test_it_serves_and_ends_at_once_whoever_follows(serve):
    process = serve()
    assert httpx.get(f"{process.url}/healthz").json() == {"status": "ok"}
    with httpx.stream("GET", f"{process.url}/api/v1/events", timeout=120) as following:
        assert following.status_code == 200
        lines = following.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        process.process.terminate()
        for _ in lines:  # to the end of what would go on for ever
            pass
    assert process.process.wait(timeout=120) == 0
    assert process.process.stderr.read() == ""


def test_it_starts_without_anything_heavy(serve, tmp_path):
    process = serve()
    with open(f"/proc/{process.process.pid}/maps") as maps:  # noqa: PTH123
        loaded = maps.read()
    assert "libtorch" not in loaded
    assert process.stop() == (0, "")


def test_limits_hold_over_real_connections(serve):
    process = serve()
    host, port = process.url.removeprefix("http://").split(":")
    head = "PUT /api/v1/studies/mine/trials/3/remark HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=120) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for _ in range(40):
                client.sendall(piece)
        except OSError:
            pass  # it has said no and closed
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection((host, int(port)), timeout=120) as client:
        client.sendall(f"{head}Content-Length: 5000000\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    answer = httpx.get(f"{process.url}/healthz", headers={"Host": "evil.example"})
    assert answer.status_code == 400
    assert "server" not in answer.headers
    code, said = process.stop()
    assert (code, said) == (0, "")


def test_no_token_is_ever_in_the_log(serve, tmp_path):
    process = serve()
    with Store.open(str(tmp_path / "autoq.db")) as store:
        secret, _ = store.accounts.create("x", "ada", "admin")
    assert httpx.get(f"{process.url}/api/v1/studies?token={secret}").status_code == 401
    headers = {"Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{process.url}/api/v1/studies", headers=headers).status_code == 200
    httpx.get(f"{process.url}/api/v1/studies/none?x={secret}", headers=headers)
    _, said = process.stop()
    assert "autoq_" not in said


def test_other_machines_are_let_in_with_tokens_only(autoq, serve, tmp_path):
    refused = autoq("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "autoq: --host 0.0.0.0 is open to other machines, and nobody has a token yet; "
        "make one with: autoq token create NAME --user USER --role admin\n"
    )
    assert autoq("token", "create", "x", "--user", "ada", "--role", "admin").exit_code == 0
    process = serve("--host", "0.0.0.0")
    assert httpx.get(f"{process.url}/api/v1/studies").status_code == 401
    code, said = process.stop()
    assert code == 0
    assert said.startswith("autoq: --host 0.0.0.0 is open to other machines without TLS")
    assert said.count("\n") == 1
    assert serve("--host", "0.0.0.0", "--tls-terminated").stop() == (0, "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--port", "70000"], "autoq: Invalid value for '--port'"),
        (["--models", "nowhere"], "autoq: --models: there is no folder 'nowhere'"),
        (["--ssl-keyfile", "x"], "autoq: --ssl-keyfile needs --ssl-certfile"),
        (["--root-path", "x/"], "autoq: --root-path 'x/' must begin with / and not end with one"),
        (["--places", "3"], "autoq: --places 3 are of a Ray cluster; name it with --cluster"),
        (["--cluster", "ray:/head"], "autoq: --cluster 'ray:/head' must be auto, HOST:PORT of a Ray cluster"),
        (["--host", "no.such.host.invalid"], "autoq: --host no.such.host.invalid is open to other machines"),
        (["--db", "nowhere/autoq.db"], "autoq: the database 'nowhere/autoq.db' cannot be made"),
    ],
)
def test_what_it_does_not_start_with(autoq, options, line):
    result = autoq("serve", *options)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken(autoq):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = autoq("serve", "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr == f"autoq: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_tokens_are_made_listed_and_revoked(autoq, tmp_path):
    made = autoq("token", "create", "laptop", "--user", "ada", "--role", "submitter", "--expires", "90d")
    secret = made.stdout.strip()
    assert made.stderr.startswith("token 1 of ada (submitter), valid until 20")
    with Store.open(str(tmp_path / "autoq.db")) as store:
        assert store.accounts.find(secret).user == "ada"
    told = json.loads(autoq("token", "list", "--json").stdout)["tokens"]
    assert [(t["name"], t["role"], t["valid"]) for t in told] == [("laptop", "submitter", True)]
    assert secret not in autoq("token", "list").stdout
    assert autoq("token", "revoke", "1").stdout == "token 1 (laptop) of ada is revoked\n"
    assert json.loads(autoq("token", "list", "--json").stdout)["tokens"][0]["valid"] is False
    assert autoq("token", "revoke", "9").exit_code == 2
    assert autoq("token", "create", "x", "--user", "a b", "--role", "admin").exit_code == 2
    for wrong in ("soon", "0s", "-3d", "99999999d"):
        refused = autoq("token", "create", "x", "--user", "a", "--role", "admin", "--expires", wrong)
        assert refused.exit_code == 2
        assert "--expires" in refused.stderr
    as_json = json.loads(autoq("token", "create", "x", "--user", "a", "--role", "viewer", "--json").stdout)
    assert as_json["token"].startswith("autoq_")
    assert as_json["expires_at"] is None


def test_small_answers_do_not_wait_for_acknowledgements():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
