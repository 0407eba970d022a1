"""Commands with `--server` against a real server on loopback: what they print is what they print from the database."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time

import pytest
import uvicorn

from autoq.cli.remote import fetch
from autoq.client import Server, check_url, read_token
from autoq.errors import AutoQError, BadInput, NotFound, SpecError
from autoq.service.app import create_app
from autoq.service.settings import Settings
from autoq.store import Prepared, Store

OBJECTIVES = [("kl_nats_per_token", "nats/token", "minimize"), ("size_bytes", "bytes", "minimize")]


class Desk:
    """A backroom that knows one model."""

    def known(self, spec):
        return None

    async def prepare(self, spec):
        if spec.model.id != "demo:smollm2":
            raise SpecError(f"model.id: no model {spec.model.id[:80]!r}")
        return Prepared(OBJECTIVES, {"layers": {}}, {"layers": 210})


@pytest.fixture
def server(database, tmp_path):
    """The filled database behind a server; its URL."""
    with Store.open(database) as store:
        app = create_app(store, Settings(port=0, exports=tmp_path / "exports"), Desk())
        running = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=running.run)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join()


READS = [
    ("studies",),
    ("studies", "--json"),
    ("trials", "demo"),
    ("trials", "demo", "--json"),
    ("trials", "demo", "--state", "failed", "--limit", "1"),
    ("frontier", "demo"),
    ("frontier", "demo", "--json"),
    ("frontier", "demo", "--csv"),
    ("frontier", "demo", "--max", "size_bytes=100MB", "--min", "latency_decode_ms=12"),
    ("pick", "demo", "--max", "size_bytes=100MB", "--json"),
    ("pick", "demo", "--max", "kl_nats_per_token=0.2", "--best", "size_bytes"),
    ("diff", "demo", "uniform-int4", "4"),
    ("diff", "demo", "3", "4", "--json"),
    ("frontier", "1"),
]


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_a_server_says_what_the_database_says(autoq, server, command):
    here, there = autoq(*command), autoq(*command, "--server", server)
    assert (there.exit_code, there.stdout) == (here.exit_code, here.stdout) == (0, there.stdout)
    assert there.stdout
    assert there.stderr == here.stderr


REFUSED = [
    ("pick", "demo", "--max", "size_bytes=1MB"),
    ("pick", "demo", "--best", "speed"),
    ("frontier", "demo", "--max", "size=1"),
    ("diff", "demo", "1", "99"),
]


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_errors_are_the_same_line_and_exit_code(autoq, server, command):
    here, there = autoq(*command), autoq(*command, "--server", server)
    assert there.stderr == here.stderr
    assert there.exit_code == here.exit_code or (here.exit_code, there.exit_code) == (1, 2)
    assert there.exit_code


def test_a_server_does_not_tell_what_other_studies_there_are(autoq, server):
    done = autoq("frontier", "demon", "--server", server)
    assert (done.exit_code, done.stderr) == (2, "autoq: no study 'demon'\n")


def test_the_server_may_stand_in_the_environment(autoq, server, monkeypatch):
    monkeypatch.setenv("AUTOQ_SERVER", server)
    assert "demo" in autoq("studies", "--db", "nowhere.db").stdout


def test_a_study_is_queued_cancelled_and_resumed(autoq, server, database):
    sent = autoq("submit", "demo", "--name", "sent", "--set", "budget.trials=9", "--server", server, "--json")
    assert sent.exit_code == 0, sent.output
    assert sent.stderr.splitlines() == [
        f"{server} checks sent against its model and target",
        f"study sent is queued: {server}/studies/sent",
    ]
    study = json.loads(sent.stdout)
    assert (study["study"], study["state"], study["spec"]["budget"]["trials"]) == ("sent", "queued", 9)
    assert autoq("cancel", "sent", "--server", server).stdout == "study sent is cancelled\n"
    assert autoq("resume", "sent", "--trials", "12", "--server", server).stdout == "study sent is queued\n"
    with Store.open(database) as store:
        assert store.study("sent").spec["budget"]["trials"] == 12


def test_an_interrupt_says_what_may_have_happened(autoq, server, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "submit", interrupted)
    done = autoq("submit", "demo", "--quiet", "--server", server)
    assert done.exit_code == 130
    assert done.stderr == f"autoq: interrupted; it may have been queued: autoq studies --server {server}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "demo"), "which server? give --server URL, or set AUTOQ_SERVER"),
        (("cancel", "demo", "--server", "ftp://x"), "--server 'ftp://x' must be a URL such as https://autoq.internal"),
        (("submit", "demo", "-q", "--set", "model.id=other", "--server", "{server}"), "model.id: no model 'other'"),
        (("cancel", "demo", "--server", "{server}"), "demo"),
        (
            ("pick", "demo", "--max", "size_bytes=1GB", "--refine", "1", "--server", "{server}"),
            "--refine measures here",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(autoq, server, arguments, said):
    done = autoq(*(argument.format(server=server) for argument in arguments))
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_not_there_is_one_line(autoq, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    done = autoq("studies", "--server", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert done.stderr.startswith("autoq: the server at http://127.0.0.1:9 does not answer: ")


def test_a_token_opens_a_closed_server(autoq, server, database, monkeypatch, tmp_path):
    with Store.open(database) as store:
        secret, _ = store.accounts.create("ci", "ada", "admin")
    refused = autoq("studies", "--server", server)
    assert refused.exit_code == 2
    assert "AUTOQ_TOKEN" in refused.stderr
    file = tmp_path / "token"
    file.write_text(secret)
    monkeypatch.setenv("AUTOQ_TOKEN_FILE", str(file))
    file.chmod(0o644)
    assert "chmod 600" in autoq("studies", "--server", server).stderr
    file.chmod(0o600)
    assert autoq("studies", "--server", server).exit_code == 0
    monkeypatch.setenv("AUTOQ_TOKEN", "autoq_wrong")
    wrong = autoq("studies", "--server", server)
    assert wrong.exit_code == 2
    assert "autoq_wrong" not in wrong.stderr


def test_urls_and_tokens_are_checked(monkeypatch):
    assert check_url("https://h/autoq/", "t") == "https://h/autoq"
    assert check_url("http://localhost:1", "t") == "http://localhost:1"
    assert check_url("http://h", None) == "http://h"
    for url, said in (
        ("http://h", "unencrypted"),
        ("https://u:p@h", "plain URL"),
        ("h:1", "must be a URL"),
        ("", "URL"),
    ):
        with pytest.raises(BadInput, match=said):
            check_url(url, "t")
    monkeypatch.setenv("AUTOQ_TOKEN_FILE", "gone")
    with pytest.raises(BadInput, match="cannot be read"):
        read_token()


def test_no_name_leaves_its_place_in_the_path(server):
    with Server.open(server) as client:
        for name in ("..", ".", "", "a/../../../healthz", "a?b#c", "%2e%2e"):
            with pytest.raises(NotFound):
                client.study(name)


def packed(*entries: tuple[str, bytes | None]) -> list[bytes]:
    """A tar file in pieces of odd lengths; without content an entry is a link to /etc."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    text = out.getvalue()
    return [text[start : start + 777] for start in range(0, len(text), 777)]


def test_an_export_is_unpacked_whole(tmp_path):
    content = b"x" * 5000
    fetch(iter(packed(("a/b/autoq.json", b"{}"), ("a/b/model.bin", content), ("a/b/c/d", b""))), tmp_path / "out")
    assert (tmp_path / "out" / "model.bin").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "entries",
    [
        [("../evil", b"x"), ("a/autoq.json", b"{}")],
        [("a/autoq.json", b"{}"), ("a/../../evil", b"x")],
        [("a/other.json", b"{}")],
        [("a/autoq.json", b"{}"), ("b/autoq.json", b"{}")],
    ],
)
def test_what_is_no_export_leaves_nothing_behind(tmp_path, entries):
    folder = tmp_path / "here"
    with pytest.raises(AutoQError):
        fetch(iter(packed(*entries)), folder / "out")
    with pytest.raises(AutoQError, match="cannot be unpacked"):
        fetch(iter([b"no tar file", b"at all" * 1000]), folder / "out")
    assert list(folder.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_links_are_left_out(tmp_path):
    fetch(iter(packed(("a/autoq.json", b"{}"), ("a/link", None))), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["autoq.json"]
