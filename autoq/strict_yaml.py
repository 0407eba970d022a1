"""YAML as plain data only: no anchors, no tags, no repeated keys, bounded in size and depth.

YAML can do more than a spec needs, and each extra is a way to write one thing and get another:
aliases multiply a small file into gigabytes, tags construct objects, merge keys hide what overrules
what, and the last of two equal keys wins in silence. All of these are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from autoq.errors import SpecError

MAX_BYTES = 200_000
MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise SpecError(f"must not use YAML anchors or aliases (line {line})")
        if getattr(event, "tag", None) is not None:
            raise SpecError(f"must not use YAML tags (line {line})")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SpecError(f"is nested more than {MAX_DEPTH} deep (line {line})")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise SpecError(f"holds the key {key.value[:80]!r} twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
                if key.tag == "tag:yaml.org,2002:merge":
                    raise SpecError(f"must not use YAML merge keys (line {key.start_mark.line + 1})")
        count = len(node.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < count:  # such as 1 and 0x1
            raise SpecError(f"holds a key twice, written in two ways (line {node.start_mark.line + 1})")
        return found


def parse(text: str, what: str) -> Any:
    """The plain data in a YAML text: mappings, lists, text, numbers, booleans, None, dates.

    `what` begins the message of the `SpecError` that every unusable text raises.
    """
    if len(text) > MAX_BYTES or len(text.encode(errors="replace")) > MAX_BYTES:
        raise SpecError(f"{what} is larger than {MAX_BYTES} bytes")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, made stricter
    except SpecError as problem:
        raise SpecError(f"{what} {problem}") from None
    # Implicit scalars such as 2024-99-99 or a number of 5,000 digits fail while they are built.
    except (yaml.YAMLError, ValueError, OverflowError) as problem:
        raise SpecError(f"{what} is not valid YAML: {' '.join(str(problem).split())}") from None


def read(path: Path, what: str) -> str:
    """The UTF-8 text of a file. Raises `SpecError` where it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise SpecError(f"{what} is larger than {MAX_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{what} is not UTF-8 text") from None
    except OSError as problem:
        raise SpecError(f"{what} cannot be read: {problem.strerror or problem}") from None
