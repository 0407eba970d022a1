"""Files that somebody else wrote, read as plain data within limits, and the rules that they hold.

Nothing here runs what a file brings along, reads more of it than a recipe can be, or follows a path
or a link that the file names.
"""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# As re, with two differences that count: a time limit, and the classes of POSIX, which llama.cpp's rules may use.
import regex  # type: ignore[import-untyped]

from autoq.errors import BadInput

MAX_BYTES = 16_000_000  # the assignment of 100,000 layers takes 8 MB
MAX_PATTERN = 2000
MAX_MATCHING_SECONDS = 10.0


def shown(value: object) -> str:
    """A value as a message may show it: short and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    # They are somebody else's words: what is no plain text is spelled out.
    return ", ".join(name[:200] if name.isprintable() else shown(name) for name in names[:3]) + more


def kind_of(path: Path) -> str:
    """`file` or `folder`. Raises `BadInput` for a path that is neither, or is not there."""
    try:
        str(path).encode()
        mode = path.stat().st_mode
    except (OSError, ValueError) as problem:
        raise BadInput(getattr(problem, "strerror", None) or "is not a name that a file can have") from None
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise BadInput("is neither a file nor a folder")


def member(folder: Path, name: str) -> Path | None:
    """The regular file `name` of a folder, or None if there is none.

    Raises `BadInput` for a link that leads out of the folder: what a folder holds is its recipe, and a
    link could lead anywhere.
    """
    path = folder / name
    try:
        inside = not path.is_symlink() or path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # links that lead in a circle
        inside = False
    if not inside:
        raise BadInput(f"{name} is a link to a file outside of the folder; give that file itself")
    return path if path.is_file() else None


def read_bytes(path: Path) -> bytes:
    """The whole of a file of at most `MAX_BYTES`. Raises `BadInput` for a larger one, and `OSError`."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path.name} is larger than {MAX_BYTES} bytes")
    return raw


def decode(raw: bytes, name: str) -> str:
    """UTF-8 text. Raises `BadInput`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{name} is not UTF-8 text") from None


def parse_json(text: str, name: str) -> Any:
    """JSON without what it leaves open: no key twice, no NaN. Raises `BadInput`."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(found)
        if len(tree) != len(found):
            keys = [key for key, _ in found]
            raise BadInput(f"{name} holds the key {shown(next(k for k in keys if keys.count(k) > 1))} twice")
        return tree

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{name} is not valid JSON: {problem}") from None


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises `BadInput` and `OSError`."""
    return parse_json(decode(read_bytes(path), path.name), path.name)


class Section:
    """A mapping of a recipe and where it stands, asked field by field, each with the type it must have.

    Every method raises `BadInput` naming the field, its value and what it can be.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise BadInput(f"{where} must be a mapping (got {shown(value)})")
        self._fields = value
        self.where = where

    def __contains__(self, field: str) -> bool:
        return self._fields.get(field) is not None

    def fields(self) -> dict[str, Any]:
        """The fields as they are, with None for null."""
        return dict(self._fields)

    def name(self, field: str) -> str:
        """The field's full name."""
        return f"{self.where}.{field[:80]}"

    def refuse(self, field: str, why: str) -> NoReturn:
        """Raise `BadInput` about a field's value."""
        raise BadInput(f"{self.name(field)} {why} (got {shown(self._fields.get(field))})")

    def section(self, field: str) -> Section:
        """The mapping in a field."""
        return Section(self._fields.get(field), self.name(field))

    def whole(self, field: str, default: int | None = None) -> int:
        """A whole number; `default`, where there is one, stands for a field that is missing or null."""
        value = self._fields.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(field, "must be a whole number")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self._fields.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(field, "must be true or false")
        return value

    def choice(self, field: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """One of several words, in any case. A `default` that is not among them must be overruled."""
        value = self._fields.get(field)
        value = default if value is None else value
        if not isinstance(value, str) or value.lower() not in choices:
            self.refuse(field, f"must be one of {', '.join(choices)}")
        return value.lower()

    def names(self, field: str) -> list[str]:
        """A list of texts; none for a field that is missing or null."""
        value = self._fields.get(field)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self.refuse(field, "must be a list of texts")
        return list(value)


class Rules:
    """Regular expressions of one recipe, which together may take `MAX_MATCHING_SECONDS`.

    A short expression can take longer than anyone lives, and who wrote it is not known.
    """

    def __init__(self) -> None:
        self._left = MAX_MATCHING_SECONDS
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, name: str) -> bool:
        """Whether the pattern fits the beginning of `name`. Raises `BadInput`."""
        return self._timed(pattern, "match", name)

    def search(self, pattern: str, name: str) -> bool:
        """Whether the pattern fits some part of `name`. Raises `BadInput`."""
        return self._timed(pattern, "search", name)

    def _timed(self, pattern: str, how: str, name: str) -> bool:
        if pattern not in self._compiled:
            self._compiled[pattern] = self._compile(pattern)
        started = time.monotonic()
        try:
            found = getattr(self._compiled[pattern], how)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise BadInput(f"the pattern {shown(pattern)} takes too long to match") from None
        self._left -= time.monotonic() - started
        return found is not None

    @staticmethod
    def _compile(pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN:
            raise BadInput(f"the pattern {shown(pattern)} is longer than {MAX_PATTERN} characters")
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as problem:
            raise BadInput(f"the pattern {shown(pattern)} is not a regular expression: {problem}") from None
