"""SECURITY.md says what is so: every test that it names is there, and none of attacks is missing from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def found_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_is_there():
    named = NAMED.findall(TEXT)
    assert len(named) > 90
    missing = [
        f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or name not in found_in(ROOT / file)
    ]
    assert missing == []


def test_every_line_names_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    lines = [row for row in rows if not row.startswith("| threat |")]
    assert len(lines) > 50
    assert [row for row in lines if not NAMED.search(row.split(" | ")[-1])] == []


def test_every_test_of_attacks_is_named():
    named = set(NAMED.findall(TEXT))
    there = {
        (f"tests/security/{path.name}", name)
        for path in (ROOT / "tests" / "security").glob("test_*.py")
        for name in found_in(path)
    }
    assert sorted(there - named) == []
