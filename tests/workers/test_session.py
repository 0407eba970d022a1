from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from autoq import device
from autoq.errors import AutoQError, SpecError
from autoq.spec import WorkersSpec
from autoq.workers import session as session_module
from autoq.workers.session import Session, _has_token, check_address, find_address

REMOTE = "10.0.0.5:6379"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:6379", ("127.0.0.1", 6379)), ("localhost:1", ("localhost", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_loopback_needs_no_token(address: str, parts: tuple[str, int]) -> None:
    assert check_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "local", "10.0.0.5", "10.0.0.5:", ":6379", "h:0", "h:65536", "h:1e3", "ray://h", "http://h:1"]
)
def test_other_forms_are_refused(address: str) -> None:
    with pytest.raises(SpecError, match=r"^workers\.address: must be auto, HOST:PORT .* \(got "):
        check_address(address)


def test_the_client_server_is_an_address_like_another() -> None:
    assert check_address("ray://127.0.0.1:10001") == ("127.0.0.1", 10001)
    with pytest.raises(SpecError, match="RAY_AUTH_MODE=token"):
        check_address("ray://10.0.0.5:10001")


def test_auto_is_the_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", REMOTE)
    assert find_address("auto") == REMOTE
    assert find_address("127.0.0.1:1") == "127.0.0.1:1"
    with pytest.raises(SpecError, match=r"^workers\.address: '10\.0\.0\.5:6379' is reached over the network"):
        Session(WorkersSpec(executor="ray", address="auto"))
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(session_module.ray_services, "canonicalize_bootstrap_address", lambda _: None)
    with pytest.raises(AutoQError, match=r"'auto' found no Ray cluster on this machine; start one: ray start --head"):
        find_address("auto")


@pytest.mark.parametrize("address", [REMOTE, "head.example:6379", "0.0.0.0:6379", "[fe80::1]:6379", "127.0.0.1.org:1"])
def test_another_machine_is_refused_without_token_authentication(address: str) -> None:
    with pytest.raises(SpecError, match="RAY_AUTH_MODE=token"):
        check_address(address)


def test_and_without_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(SpecError, match="there is no token"):
        check_address(REMOTE)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(SpecError, match="there is no token"):
        check_address(REMOTE)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert check_address(REMOTE) == ("10.0.0.5", 6379)


def test_a_token_file_is_for_its_owner_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    for mode in (0o644, 0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(SpecError, match=r"chmod 600 .*auth_token"):
            check_address(REMOTE)
    path.chmod(0o600)
    assert check_address(REMOTE) == ("10.0.0.5", 6379)


def test_a_token_that_others_can_read_protects_no_local_session(tmp_path: Path) -> None:
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    for mode, counts in {0o600: True, 0o644: False}.items():
        path.chmod(mode)
        assert _has_token() is counts


def test_a_refused_address_starts_nothing() -> None:
    with pytest.raises(SpecError):
        Session(WorkersSpec(executor="ray", address=REMOTE))
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    before = dict(os.environ)
    with pytest.raises(AutoQError, match=r"^workers\.address: nothing answers at '127\.0\.0\.1:1': .*refused"):
        Session(WorkersSpec(executor="ray", address="127.0.0.1:1"))
    assert dict(os.environ) == before


def test_the_error_for_a_failed_start_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no room\nfor details see elsewhere")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    before = dict(os.environ)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(AutoQError, match=r"^Ray cannot be started: no room$"):
        Session(WorkersSpec(executor="ray"))
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session(WorkersSpec(executor="ray", count=3, cpus=1))
    yield session
    session.close()


@pytest.fixture(scope="module")
def token(session: Session) -> str:
    file = Path.home() / ".ray" / "auth_token"  # where Ray keeps that of somebody who uses it for other things
    return os.environ.get("RAY_AUTH_TOKEN") or file.read_text()


JOIN = """
import sys
from autoq.search.executors import Job
from autoq.spec import StudySpec
from autoq.workers.executor import RayExecutor

class Fake:
    def __init__(self, spec): self.spec = spec
    def echo(self, value): return value

workers = {"executor": "ray", "count": 2, "cpus": 1, "address": sys.argv[1]}
with RayExecutor(StudySpec.model_validate({"model": {"id": "demo:smollm2"}, "workers": workers}), Fake) as executor:
    for i in range(4):
        executor.submit(Job(str(i), "echo", {"value": i}))
    print(sorted(result.value for result in iter(executor.next, None)))
"""


def join(token: str) -> subprocess.CompletedProcess[str]:
    """A study of another process on this one's Ray, joined over loopback."""
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", JOIN, f"127.0.0.1:{port}"],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_a_study_joins_a_running_cluster_and_leaves_it_on(session: Session, token: str) -> None:
    done = join(token)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 2, 3]\n", "", 0)
    assert [node["Alive"] for node in ray.nodes()] == [True]


@pytest.mark.slow
def test_nobody_joins_with_another_token(session: Session) -> None:
    done = join("0" * 64)
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr or "Unauthenticated" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_a_second_session_uses_the_first_and_leaves_it_on(session: Session) -> None:
    second = Session(WorkersSpec(executor="ray", count=1, cpus=1))
    second.close()
    second.close()
    assert ray.is_initialized()
    with pytest.raises(SpecError, match=r"is connected to .* already, not '127\.0\.0\.1:1'"):
        Session(WorkersSpec(executor="ray", address="127.0.0.1:1"))
    assert ray.is_initialized()


@pytest.mark.slow
def test_workers_that_do_not_fit_are_refused(session: Session) -> None:
    total = int(ray.cluster_resources()["CPU"])
    with pytest.raises(SpecError, match=rf"2 workers of {total} CPUs and 0 GPUs do not fit; Ray has {total} CPUs"):
        Session(WorkersSpec(executor="ray", count=2, cpus=total))
    with pytest.raises(SpecError, match=r"1 workers of 1 CPUs and 0\.5 GPUs do not fit"):
        Session(WorkersSpec(executor="ray", count=1, cpus=1, gpus=0.5))
    # The session was started with room for three workers, however many cores there are.
    alone, each = (Session(WorkersSpec(executor="ray", count=count)).cpus for count in (1, 3))
    assert (alone, each) == (min(total, device.threads()), max(1, min(total, device.threads()) // 3))
