"""Commands with `--server` against a real server on loopback: what they print is what they print from the database."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import threading
import time
import types

import pytest
import uvicorn
import yaml

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


def test_a_study_is_removed_there(autoq, server, database):
    asked = autoq("remove", "demo", "--server", server)
    assert asked.exit_code == 2
    assert re.fullmatch(r"autoq: this removes study 'demo' with \d+ trials for good; say so with --yes\n", asked.stderr)
    told = json.loads(autoq("remove", "demo", "--yes", "--json", "--server", server).stdout)
    assert told["study"] == "demo"
    with Store.open(database) as store:
        assert "demo" not in [study.name for study in store.studies()]
        assert [removal.name for removal in store.queue.removals()] == ["demo"]


def test_an_interrupt_says_what_may_have_happened(autoq, server, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "submit", interrupted)
    done = autoq("submit", "demo", "--quiet", "--server", server)
    assert done.exit_code == 130
    assert re.match(r"autoq: interrupted; it may have been queued: the same command with --key \w+ sends", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "demo"), "which server? give --server URL, or set AUTOQ_SERVER"),
        (("cancel", "demo", "--server", "ftp://x"), "--server 'ftp://x' must be a URL such as https://autoq.internal"),
        (("submit", "demo", "-q", "--set", "model.id=other", "--server", "{server}"), "model.id: no model 'other'"),
        (("cancel", "demo", "--server", "{server}"), "demo"),
        (
            ("pick", "demo", "--max", "speed=1GB", "--refine", "1", "--server", "{server}"),
            "speed",
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


def test_a_submission_that_nobody_answered_can_be_sent_again(autoq, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda _: None)
        lost = autoq("submit", "demo", "--name", "sent", "--server", "http://127.0.0.1:9", "--quiet")
    assert lost.exit_code == 1
    found = re.search(r"; it may have been queued: the same command with (--key \w+) sends", lost.stderr)
    assert found is not None
    again = ("submit", "demo", "--name", "sent", "--server", server, "--json", *found[1].split())
    said = [json.loads(autoq(*again).stdout) for _ in range(2)]
    assert said[0] == said[1]


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


# What a command does with a server. One that is new has to say so here.
READERS = {
    "studies": [()],
    "trials": [("demo",)],
    "frontier": [("demo",), ("demo", "--min", "size_bytes=75MB")],
    "pick": [("demo", "--max", "size_bytes=100MB")],
    "diff": [("demo", "3", "4")],
    "report": [("demo", "--out", "{out}")],
    "token list": [()],
    "methods": [()],
    "targets": [()],
    "objectives": [()],
    "samplers": [()],
}
WRITERS = {"submit", "cancel", "remove", "resume", "export", "token create", "token revoke"}
HERE = {
    "plan",  # of this machine
    "search",  # measures on this machine; `submit` has a server do it
    "sensitivity",  # as well
    "recover",
    "sequential",
    "verify",  # a folder that is here
    "serve",
    "doctor",  # what is installed here
    "copy",  # from one database to another
}


def commands(group, before=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", {option for parameter in command.params for option in parameter.opts}


def test_every_command_says_whether_it_asks_a_server():
    from typer.main import get_command

    from autoq.cli import app

    found = dict(commands(get_command(app)))
    assert set(found) == READERS.keys() | WRITERS | HERE
    assert {name for name, options in found.items() if "--server" in options} == READERS.keys() | WRITERS


@pytest.mark.parametrize("name", READERS)
def test_every_command_that_reads_gives_the_same_json_from_a_server(
    autoq, server, database, tmp_path, name, monkeypatch
):
    with Store.open(database) as store:
        secret, _ = store.accounts.create("mine", "ada", "admin")
    monkeypatch.setenv("AUTOQ_TOKEN", secret)
    for arguments in READERS[name]:
        told = []
        for where in ((), ("--server", server)):
            out = tmp_path / f"{len(told)}.html"
            line = [*name.split(), *(each.format(out=out) for each in arguments), *where]
            done = autoq(*line, *([] if "--out" in line else ["--json"]))
            assert done.exit_code == 0, done.output
            told.append(out.read_text() if out.exists() else json.loads(done.stdout))
        if name == "token list":
            told = [[{**token, "used_at": None} for token in each["tokens"]] for each in told]
        assert told[0] == told[1]
        assert told[0]


def test_a_server_offers_what_the_database_offers(autoq, server, database, monkeypatch):
    offer = {
        "predicted": {
            "kl_nats_per_token": {"value": 0.05, "low": 0.04, "high": 0.06, "kind": "predicted"},
            "size_bytes": {"value": 99e6, "low": 99e6, "high": 99e6, "kind": "computed"},
        },
        "assignment": {"model.layers.0.q_proj": "rtn-int8-g64"},
        "trial": None,
    }
    fake = types.ModuleType("autoq.search.offers")
    fake.offer_json = lambda *_: offer
    monkeypatch.setitem(sys.modules, "autoq.search.offers", fake)

    async def ask(*_):
        return offer

    monkeypatch.setattr(Desk, "offer", ask, raising=False)
    line = ("pick", "demo", "--max", "size_bytes=100MB", "--json")
    assert "offer" not in json.loads(autoq(*line).stdout)
    with Store.open(database) as store:
        store.put_table(1, "sensitivity", {"model.layers.0.q_proj": {"rtn-int4-g64": 0.1}})
    here, there = autoq(*line), autoq(*line, "--server", server)
    assert json.loads(here.stdout)["offer"]["predicted"] == offer["predicted"]
    assert (here.stdout, here.stderr) == (there.stdout, there.stderr)


def test_a_refinement_is_measured_by_the_server(autoq, server, database):
    line = ("pick", "demo", "--max", "size_bytes=100MB", "--refine", "2", "--server", server)
    found = []
    waiting = threading.Thread(target=lambda: found.append(autoq(*line)))
    waiting.start()
    with Store.open(database) as store:
        while store.study("demo").state != "queued":
            time.sleep(0.01)
        assert store.table(1, "job")["kind"] == "refine"
        store.queue.settle(1, "finished")
    waiting.join()
    assert found[0].exit_code == 0, found[0].output
    assert f"study demo is queued: {server}/studies/demo" in found[0].stderr
    assert yaml.safe_load(found[0].stdout)["study"] == "demo"


def test_tokens_are_made_and_revoked_on_a_server(autoq, server, database, monkeypatch):
    first = json.loads(
        autoq("token", "create", "a", "--user", "ada", "--role", "admin", "--server", server, "--json").stdout
    )
    assert autoq("studies", "--server", server).exit_code == 2
    monkeypatch.setenv("AUTOQ_TOKEN", first["token"])
    made = autoq("token", "create", "b", "--user", "bob", "--role", "viewer", "--expires", "90d", "--server", server)
    assert made.stdout.startswith("aq_") or len(made.stdout.strip()) > 20
    assert "of bob (viewer), valid until 20" in made.stderr
    assert autoq("token", "revoke", "2", "--server", server).stdout == "token 2 (b) of bob is revoked\n"
    with Store.open(database) as store:
        assert [token.valid() for token in store.accounts.list()] == [True, False]
    assert autoq("token", "revoke", "9", "--server", server).stderr == "autoq: no token with id 9\n"


def test_a_report_that_there_is_none_of_is_one_line(autoq, server, database, tmp_path):
    done = autoq("submit", "demo", "--name", "fresh", "--server", server)
    assert done.exit_code == 0, done.output
    done = autoq("report", "fresh", "--out", str(tmp_path / "x.html"), "--server", server)
    assert done.exit_code == 2
    assert done.stderr == "autoq: study 'fresh' has no complete trial: there is nothing to report yet\n"
    assert not (tmp_path / "x.html").exists()
