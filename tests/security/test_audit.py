"""The audit of dependencies: what it calls something to do, and whom it blames."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    found = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(found)
    import sys

    sys.modules["audit"] = module  # which dataclasses ask for
    found.loader.exec_module(module)
    return module


def report(*packages):
    return {"dependencies": [dict(package) for package in packages], "fixes": []}


def vulnerable(name, version, *fixes, advisory="PYSEC-2030-1"):
    return {"name": name, "version": version, "vulns": [{"id": advisory, "fix_versions": list(fixes), "aliases": []}]}


CLEAN = {"name": "clean", "version": "1.0", "vulns": []}
SKIPPED = {"name": "skipped", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("told", "todo", "fragment"),
    [
        (report(CLEAN), False, "1 of 1 pinned packages were looked up"),
        (report(CLEAN, SKIPPED), False, "1 of 2 pinned packages were looked up, 1 could not be"),
        (
            report(vulnerable("Some_Thing", "1.0", "1.1", "2.0")),
            True,
            "some-thing==1.0: PYSEC-2030-1: pin some-thing==1.1",
        ),
        (report(vulnerable("thing", "1.0")), False, "there is no fixed version yet"),
        (report(vulnerable("thing", "1.9", "1.8", "0.9")), False, "there is no fixed version yet"),
        (report(vulnerable("thing", "1.0", "odd version", "1.2")), True, "pin thing==1.2"),
        (report(vulnerable("bounded", "1.0", "2.0")), False, "there is no fixed version yet"),
        (report(vulnerable("bounded", "1.0", "2.0", "1.5")), True, "pin bounded==1.5"),
        (
            report(vulnerable("thing", "1.0", "2.0", advisory="OURS-1")),
            False,
            "accepted: thing==1.0: OURS-1: not reached",
        ),
    ],
)
def test_what_there_is_to_do(audit, told, todo, fragment):
    allowed = {"bounded": Requirement("bounded>=1,<2")}
    lines, found = audit.verdict(told, allowed, {"OURS-1": "not reached"})
    assert found == todo
    assert fragment in "\n".join(lines)


def test_what_is_accepted_in_vain_is_told(audit):
    lines, todo = audit.verdict(report(CLEAN), {}, {"OLD-1": "was once"})
    assert not todo
    assert "OLD-1 is accepted and concerns nothing any more" in lines[-1]


def test_accepted_advisories_have_reasons(audit, tmp_path):
    (tmp_path / "accepted.txt").write_text("# why\n\nPYSEC-1  never parsed here\n")
    assert audit.accepted(tmp_path / "accepted.txt") == {"PYSEC-1": "never parsed here"}
    assert audit.accepted(tmp_path / "none") == {}
    assert all(audit.accepted(ROOT / ".ci" / "accepted.txt").values())


def test_the_ranges_are_those_of_the_project(audit):
    found = audit.ranges(ROOT / "pyproject.toml")
    assert found["torch"].specifier.contains("2.13.0")
    assert not found["torch"].specifier.contains("1.0")


@pytest.fixture
def commits(tmp_path):
    """A repository: change a file and commit."""

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    def commit(name, text):
        (tmp_path / name).write_text(text)
        git("add", name)
        git("commit", "-q", "-m", name)

    git("init", "-q")
    return commit


def test_who_is_to_blame_is_who_pinned(audit, commits, tmp_path, monkeypatch, capsys):
    told = report(vulnerable("thing", "1.0", "1.1"))
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "ask", lambda *_: told)
    monkeypatch.setattr(audit, "ranges", lambda _: {})
    commits("constraints.txt", "thing==1.0")
    assert audit.main(["--ci"]) == 0  # the first commit of all: nothing to compare with
    commits("constraints.txt", "thing==1.0\nother==1.0")
    assert audit.main(["--ci"]) == 1
    commits("README.md", "x")
    assert audit.main(["--ci"]) == 0
    assert "this commit did not choose these versions" in capsys.readouterr().out
    assert audit.main([]) == 1
    commits("pyproject.toml", "x")
    assert audit.main(["--ci"]) == 1


@pytest.mark.parametrize(
    "problem",
    [
        OSError("no network"),
        subprocess.TimeoutExpired("pip", 1),
        subprocess.CalledProcessError(1, "pip"),
        json.JSONDecodeError("x", "", 0),
    ],
)
def test_a_network_that_is_away_blames_nobody(audit, monkeypatch, capsys, problem):
    def ask(*_):
        raise problem

    monkeypatch.setattr(audit, "ask", ask)
    assert audit.main([]) == audit.main(["--ci"]) == 0
    assert "nothing could be looked up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "told", [{}, [], None, {"dependencies": [{}]}, {"dependencies": [{"vulns": [{}], "name": "x"}]}]
)
def test_an_odd_report_blames_nobody(audit, monkeypatch, told):
    monkeypatch.setattr(audit, "ask", lambda *_: told)
    assert audit.main([]) == 0


def test_ci_runs_it():
    assert "make audit AUDIT=--ci" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
