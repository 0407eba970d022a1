"""What AutoQ leaves on a disk, and what it reads from one again: modes, exports, archives."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest

from autoq.cli.remote import fetch
from autoq.errors import AutoQError, BadInput, ExportBroken
from autoq.shipping import manifest as files
from autoq.store import Store


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask():
    """A process whose new files everybody may read and write, unless it says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_database_is_its_owners_alone(tmp_path, open_umask):
    path = tmp_path / "autoq.db"
    with Store.open(str(path)) as store:
        store.accounts.create("laptop", "ada", "admin")
        beside = sorted(tmp_path.glob("autoq.db*"))
        assert path in beside
        assert [mode(file) for file in beside] == [0o600] * len(beside)
    path.chmod(0o640)  # whose group may read it is for its owner to say
    with Store.open(str(path)):
        assert mode(path) == 0o640


def test_a_database_is_made_where_nothing_is_and_nowhere_else(tmp_path):
    (tmp_path / "elsewhere").write_text("x" * 5000)
    (tmp_path / "link.db").symlink_to(tmp_path / "made.db")
    with Store.open(str(tmp_path / "link.db")):
        assert (tmp_path / "made.db").exists()
    with pytest.raises(AutoQError):
        Store.open(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere").read_text() == "x" * 5000


def test_a_servers_folder_is_its_owners_alone(tmp_path, open_umask):
    from autoq.service.scheduler import Scheduler

    with Store.open(str(tmp_path / "autoq.db")) as store:
        scheduler = Scheduler(store, 1, folder=tmp_path / "deep" / "server")
        scheduler.start()
        try:
            assert mode(tmp_path / "deep" / "server") == 0o700
            assert (tmp_path / "deep" / "server" / "exports").is_dir()
        finally:
            scheduler.stop()


def test_a_token_file_that_others_can_read_is_refused(tmp_path, monkeypatch):
    from autoq.client import read_token

    file = tmp_path / "token"
    file.write_text("autoq_x\n")
    monkeypatch.delenv("AUTOQ_TOKEN", raising=False)
    monkeypatch.setenv("AUTOQ_TOKEN_FILE", str(file))
    for wrong in (0o644, 0o640, 0o604, 0o620, 0o601, 0o777):
        file.chmod(wrong)
        with pytest.raises(BadInput, match="others can read"):
            read_token()
    file.chmod(0o600)
    assert read_token() == "autoq_x"


MANIFEST = {
    "autoq": "0", "created": "", "study": "s", "trial": 1, "target": "gguf", "searched_on": "t", "runtime": "r",
    "written_as": "w", "run": "", "spec": {}, "hash": "", "size_bytes": 1, "other_bytes": 0, "measurements": {},
    "weights": [], "report_tokens": "0" * 64, "versions": {}, "noise": {}, "files": {},
}  # fmt: skip
ENTRY = {"bytes": 1, "sha256": "0" * 64}
OUTSIDE = ("/etc/passwd", "../x", "a/../../x", "..", ".", "", "a\\..\\x", "autoq.json", "./../x")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "weights"])
def test_a_manifest_names_nothing_outside(tmp_path, name, where):
    named = {"files": {name: ENTRY}} if where == "files" else {"weights": [name]}
    (tmp_path / "autoq.json").write_text(json.dumps(MANIFEST | named))
    with pytest.raises(ExportBroken, match="names a file outside"):
        files.read(tmp_path)


@pytest.mark.timeout(60)
def test_an_export_of_links_and_pipes_is_broken(tmp_path):
    (tmp_path / "autoq.json").write_text(json.dumps(MANIFEST))
    manifest = files.read(tmp_path)
    for make in (lambda path: path.symlink_to("/etc/passwd"), os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / "assignment.json")
        with pytest.raises(ExportBroken):
            files.changed_files(tmp_path, {})
        with pytest.raises(ExportBroken):
            files.read_assignment(tmp_path, manifest)
        (tmp_path / "assignment.json").unlink()
    (tmp_path / "autoq.json").unlink()
    os.mkfifo(tmp_path / "autoq.json")
    with pytest.raises(BadInput):
        files.read(tmp_path)


def test_a_manifest_that_is_too_large_or_too_deep(tmp_path):
    with (tmp_path / "autoq.json").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    with pytest.raises(ExportBroken, match="it cannot be one of AutoQ's"):
        files.read(tmp_path)
    for text in (
        "[" * 100_000,
        '{"format":' * 50_000,
        "9" * 5000,
        "null",
        json.dumps(MANIFEST | {"size_bytes": "NaN"}),
    ):
        (tmp_path / "autoq.json").write_text(text)
        with pytest.raises(ExportBroken):
            files.read(tmp_path)


def archive(*entries: tuple[str, bytes, bytes | None]) -> list[bytes]:
    """A tar file of (name, type, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o6777
            info.uid = info.gid = 0
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = (content or b"").decode()
                tar.addfile(info)
            else:
                info.size = len(content or b"")
                tar.addfile(info, io.BytesIO(content or b""))
    return [out.getvalue()]


GOOD = ("export/autoq.json", tarfile.REGTYPE, b"{}")


@pytest.mark.parametrize(
    "name", ["../escaped", "/dev/shm/autoq-escaped", "export/../../escaped", "export/x/../../../escaped"]
)
def test_an_archive_writes_nothing_outside(tmp_path, name):
    out = tmp_path / "deep" / "out"
    evil = (name, tarfile.REGTYPE, b"x")
    try:
        fetch(iter(archive(GOOD, evil)), out)
    except AutoQError:
        assert not out.exists()
    assert [path for path in tmp_path.rglob("*escaped*") if not path.is_relative_to(out)] == []
    assert not Path("/dev/shm/autoq-escaped").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
@pytest.mark.parametrize("target", [b"/etc/passwd", b"../../secret", b"."])
def test_an_archive_holds_files_and_folders_alone(tmp_path, kind, target):
    secret = tmp_path / "secret"
    secret.write_text("x")
    out = tmp_path / "out"
    through = ("export/link/planted", tarfile.REGTYPE, b"planted")
    try:
        fetch(iter(archive(GOOD, ("export/link", kind, target), through)), out)
    except AutoQError:
        assert not out.exists()
    else:
        found = list(out.rglob("*"))
        assert all(path.is_dir() or stat.S_ISREG(path.lstat().st_mode) for path in found)
    assert secret.read_text() == "x"
    assert not (tmp_path / "planted").exists()


def test_an_archive_sets_no_modes_that_matter(tmp_path):
    out = tmp_path / "out"
    fetch(iter(archive(GOOD, ("export/run", tarfile.REGTYPE, b"x"))), out)
    assert mode(out / "run") & 0o7022 == 0  # neither set-uid nor writable by others


@pytest.mark.parametrize("sent", [b"", b"\0" * 10_240, b"<html>", os.urandom(2000)])
def test_what_is_no_archive(tmp_path, sent):
    with pytest.raises(AutoQError):
        fetch(iter([sent]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
