"""Assignments: a scheme for every layer, with one canonical text and one hash."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping

from autoq.errors import BadInput
from autoq.scheme import Scheme, parse_scheme


class Assignment(Mapping[str, Scheme]):
    """Layer name -> scheme, immutable and hashable by content."""

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        self._schemes = dict(sorted(schemes.items()))

    def __getitem__(self, layer: str) -> Scheme:
        return self._schemes[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __hash__(self) -> int:
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assignment) and self._schemes == other._schemes

    def __repr__(self) -> str:
        return f"Assignment({len(self)} layers, {self.hash[:12]})"

    @functools.cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no blanks, schemes in text form."""
        return json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=True)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def to_dict(self) -> dict[str, str]:
        """Layer name -> scheme text, sorted by name."""
        return {layer: str(scheme) for layer, scheme in self._schemes.items()}

    @classmethod
    def from_dict(cls, texts: Mapping[str, str]) -> Assignment:
        """The inverse of `to_dict`. Raises `BadInput` for anything that is not name -> scheme text."""
        if not isinstance(texts, Mapping):
            raise BadInput("an assignment must be a mapping of layer name to scheme")
        for layer, text in texts.items():
            if not isinstance(layer, str) or not isinstance(text, str):
                raise BadInput(f"assignment entry {layer!r}: {text!r} must map a name to a scheme text")
        return cls({layer: parse_scheme(text) for layer, text in texts.items()})

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """The inverse of `json`. Raises `BadInput` for text that is not JSON of that form."""
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise BadInput(f"the assignment is not JSON: {problem}") from None
        return cls.from_dict(parsed)


def diff(a: Assignment, b: Assignment) -> dict[str, tuple[Scheme | None, Scheme | None]]:
    """Layers whose schemes differ, with the scheme of each side (None where a side lacks the layer)."""
    names = sorted({*a, *b})
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
