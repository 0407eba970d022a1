"""Known vulnerabilities of the versions that `constraints.txt` pins, by pip-audit and the advisories that PyPI keeps.

    make audit                   ends with 1 where a pinned version is vulnerable and a later one is not
    make audit AUDIT=--ci        ends with 1 only where the last commit changed what is pinned

An advisory appears overnight, for a commit that changed nothing. Who is answerable for a version is the commit that
pins it, so CI is red for that one alone and tells all others what there is to do. What has no fixed version within the
ranges of pyproject.toml is told too; nobody could act on a red CI. So is what was looked at and does not concern us:
a line `ID reason` in `.ci/accepted.txt`. Without a network, or an index without advisories, it says how much could not
be looked at, and ends with 0: that says nothing about the commit.

pip-audit has an environment of its own, so that what it needs is not mixed with what is audited.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
TOOL = "pip-audit>=2.9,<3"
SECONDS = 300.0


@dataclass(frozen=True)
class Finding:
    """A pinned version that an advisory names, and the least later version that it does not, if there is one."""

    name: str
    version: str
    advisory: str
    fixed: str | None

    @property
    def line(self) -> str:
        """What there is to do."""
        do = f"pin {self.name}=={self.fixed} or later" if self.fixed else "there is no fixed version yet"
        return f"{self.name}=={self.version}: {self.advisory}: {do}"


def judge(told: Any, ranges: Mapping[str, Requirement]) -> tuple[list[Finding], int, int]:
    """What pip-audit's JSON says: findings, and of how many packages it knew something, out of how many."""
    packages = told["dependencies"]
    findings = []
    for package in packages:
        for found in package.get("vulns", ()):
            name = canonical(package["name"])
            fixed = _fixed(package["version"], found["fix_versions"], ranges.get(name))
            findings.append(Finding(name, package["version"], found["id"], fixed))
    known = sum("skip_reason" not in package for package in packages)
    return sorted(set(findings), key=lambda f: (f.name, f.advisory)), known, len(packages)


def _fixed(version: str, candidates: Iterable[str], wanted: Requirement | None) -> str | None:
    later = []
    for candidate in candidates:
        try:
            found = Version(candidate)
        except InvalidVersion:
            continue
        if found > Version(version) and (wanted is None or wanted.specifier.contains(found, prereleases=True)):
            later.append(found)
    return str(min(later)) if later else None


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ranges(pyproject: Path) -> dict[str, Requirement]:
    """Which versions pyproject.toml allows of the packages that it names."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return {canonical(found.name): found for found in map(Requirement, texts)}


def accepted(file: Path) -> dict[str, str]:
    """Advisories that do not concern us, and why."""
    if not file.is_file():
        return {}
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return {advisory: reason.strip() for advisory, _, reason in pairs}


def pins_changed(root: Path) -> bool:
    """Whether the last commit changed what is pinned. False where that cannot be told."""
    command = ["git", "-C", str(root), "diff", "--quiet", "HEAD^", "HEAD", "--", "constraints.txt", "pyproject.toml"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 1  # noqa: S603 - git itself


def ask(constraints: Path, folder: Path) -> Any:
    """What pip-audit says of the pinned versions. Raises `OSError`, `ValueError`, `subprocess.SubprocessError`."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    quiet = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOOL]
    subprocess.run(quiet, capture_output=True, timeout=SECONDS, check=True)  # noqa: S603 - our own environment
    command = [str(python), "-m", "pip_audit", "--requirement", str(constraints), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    return json.loads(done.stdout)


def verdict(told: Any, allowed: Mapping[str, Requirement], ignored: Mapping[str, str]) -> tuple[list[str], bool]:
    """The lines to print, and whether there is something to do."""
    found, known, total = judge(told, allowed)
    lines = [f"audit: {known} of {total} pinned packages were looked up, {total - known} could not be"]
    lines += [f"audit: accepted: {f.name}=={f.version}: {f.advisory}: {ignored[f.advisory]}" for f in found
              if f.advisory in ignored]  # fmt: skip
    left = [f for f in found if f.advisory not in ignored]
    lines += [f"audit: {finding.line}" for finding in left]
    gone = sorted(ignored.keys() - {f.advisory for f in found}) if known == total else []
    lines += [f"audit: {advisory} is accepted and concerns nothing any more; take it out" for advisory in gone]
    return lines, any(finding.fixed for finding in left)


def main(arguments: list[str]) -> int:
    """Print what there is; the exit code."""
    try:
        told = ask(ROOT / "constraints.txt", Path(sys.prefix) / "audit")
        lines, todo = verdict(told, ranges(ROOT / "pyproject.toml"), accepted(ROOT / ".ci" / "accepted.txt"))
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as problem:
        lines, todo = [f"audit: nothing could be looked up: {type(problem).__name__}"], False
    sys.stdout.write("\n".join(lines) + "\n")
    if todo and "--ci" in arguments and not pins_changed(ROOT):
        sys.stdout.write("audit: this commit did not choose these versions, so it does not fail; the next one should\n")
        return 0
    return int(todo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
