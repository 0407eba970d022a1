"""The client: what it sends to whom, and what a server that means no good can do to it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

from autoq.client import Server, check_url
from autoq.errors import AutoQError, BadInput

TOKEN = "autoq_" + "t" * 43


class _Scripted(http.server.BaseHTTPRequestHandler):
    """Answers everything with what the test has put down, and keeps what came."""

    def do_GET(self) -> None:
        self.server.came.append((self.path, dict(self.headers)))
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_CONNECT = do_GET

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def listener() -> Iterator[http.server.HTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
    server.came, server.answer = [], (200, {}, b"{}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def other(listener) -> Iterator[http.server.HTTPServer]:
    """A second one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
    server.came, server.answer = [], (200, {}, b"{}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("AUTOQ_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def url(server: http.server.HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    "address",
    [
        "http://autoq.internal", "http://10.0.0.1:8800", "http://localhost.evil.example", "http://127.0.0.1.nip.example",
        "https://user:password@autoq.internal", "https://autoq.internal/?token=x", "https://autoq.internal/#x",
        "ftp://autoq.internal", "file:///etc/passwd", "autoq.internal", "", "http://", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_a_token_goes_nowhere_in_the_clear(address):
    with pytest.raises(BadInput) as refused:
        check_url(address, TOKEN)
    assert TOKEN not in str(refused.value)
    assert "password" not in str(refused.value)


def test_a_token_is_not_told_to_a_proxy(listener, other, monkeypatch):
    """Where HTTP_PROXY is set for all programs, a server on this machine is asked itself all the same."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, url(other))
    with Server.open(url(listener)) as server:
        server.exported(1)
    assert listener.came[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert other.came == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_token_follows_no_redirect(listener, other, status):
    listener.answer = (status, {"Location": f"{url(other)}/api/v1/exports/1"}, b"{}")
    with Server.open(url(listener)) as server, pytest.raises(AutoQError) as refused:
        server.exported(1)
    assert other.came == []
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("name", ["..", "../../tokens", "a/b", "a?x=1", "a#b", "%2e%2e", "a\r\nX: y", "a\0b", "é"])
def test_a_name_is_one_part_of_an_address(listener, name):
    listener.answer = (404, {}, b'{"error": {"message": "no study"}}')
    with Server.open(url(listener)) as server, pytest.raises(AutoQError):
        server.study(name)
    for path, headers in listener.came:
        assert path.startswith("/api/v1/studies/")
        assert path.count("/") == 4
        assert "?" not in path
        assert "X" not in headers


@pytest.mark.parametrize("wait", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "nan", "inf", "1e400", "x", ""])
def test_a_server_that_says_oddly_when_to_come_back(listener, wait, monkeypatch):
    monkeypatch.setattr("autoq.client.time.sleep", lambda seconds: waited.append(seconds))
    waited: list[float] = []
    listener.answer = (503, {"Retry-After": wait}, b'{"error": {"message": "busy"}}')
    with Server.open(url(listener)) as server, pytest.raises(AutoQError, match="busy"):
        server.exported(1)
    assert waited
    assert all(0 <= seconds <= 10 for seconds in waited)


def test_nobody_steers_the_terminal(listener):
    """Escapes in what a server says could set a title, move the cursor over what was printed, or paste."""
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x7f\rok\nnext\tcell"
    listener.answer = (404, {}, json.dumps({"error": {"message": evil}}).encode())
    with Server.open(url(listener)) as server:
        with pytest.raises(AutoQError) as refused:
            server.exported(1)
        assert not [letter for letter in str(refused.value) if not letter.isprintable() and letter not in "\n\t"]
        for ascii_only in (True, False):
            body = json.dumps({evil: [evil, {"x": evil}]}, ensure_ascii=ascii_only).encode()
            listener.answer = (200, {}, body)
            told = json.dumps(server.exported(1), ensure_ascii=False)
            assert not [letter for letter in told if not letter.isprintable()]
            assert r"\\x1b]0;title\\x07" in told


def test_nobody_steers_the_terminal_through_an_error(capsys):
    from autoq.cli.app import _complain

    _complain("no study \x1b]0;title\x07\x9b2J\r'x'", False)
    assert capsys.readouterr().err == r"autoq: no study \x1b]0;title\x07\x9b2J\r'x'" + "\n"


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 100_000, b"9" * 6000, b"", b"\xff", b"[]", b'"x"', b"null", b"{", b"NaN"]
)
@pytest.mark.parametrize("status", [200, 404, 500])
def test_what_is_no_answer_of_autoq(listener, body, status):
    listener.answer = (status, {}, body)
    with Server.open(url(listener)) as server, pytest.raises(AutoQError, match="does not answer as AutoQ does"):
        server.exported(1)


def test_pages_that_lead_in_a_circle_end(listener):
    began = time.monotonic()
    listener.answer = (200, {}, json.dumps({"studies": [], "trials": [], "next": 0}).encode())
    with Server.open(url(listener)) as server:
        assert server.studies() == []
        assert server.trials("x", None, None, False) == []
    assert len(listener.came) <= 4
    assert time.monotonic() - began < 60
