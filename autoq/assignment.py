"""Assignments: a scheme for every layer, with one canonical text and one hash.

A layer that was trained is not determined by its scheme: it is named by the digest of its tensors besides, and its
entry reads `rtn-int3-g64#DIGEST`. So a trained assignment has a hash of its own, though its schemes are another's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from autoq.errors import BadInput
from autoq.scheme import Scheme, parse_scheme

_DIGEST = re.compile(r"[0-9a-f]{40}")
_SHOWN = 8  # digits of a digest that people compare


class Assignment(Mapping[str, Scheme]):
    """Layer name -> scheme, immutable and hashable by content.

    `trained` maps those layers whose tensors were trained to the digest of these tensors.
    """

    def __init__(self, schemes: Mapping[str, Scheme], trained: Mapping[str, str] | None = None) -> None:
        self._schemes = dict(sorted(schemes.items()))
        self.trained: Mapping[str, str] = dict(sorted((trained or {}).items()))
        assert self.trained.keys() <= self._schemes.keys(), "only layers of the assignment can be trained"

    def __getitem__(self, layer: str) -> Scheme:
        return self._schemes[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __hash__(self) -> int:
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assignment) and self._schemes == other._schemes and self.trained == other.trained

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

    def text(self, layer: str) -> str:
        """What the layer is made of: its scheme, and where it was trained the digest of its tensors."""
        scheme, digest = str(self._schemes[layer]), self.trained.get(layer)
        return scheme if digest is None else f"{scheme}#{digest}"

    def short_text(self, layer: str) -> str:
        """The same for people, with the first digits of the digest."""
        scheme, sign, digest = self.text(layer).partition("#")
        return scheme + sign + digest[:_SHOWN]

    def to_dict(self) -> dict[str, str]:
        """Layer name -> text, sorted by name."""
        return {layer: self.text(layer) for layer in self._schemes}

    def untrained(self) -> dict[str, str]:
        """Layer name -> scheme text, whatever was trained."""
        return {layer: str(scheme) for layer, scheme in self._schemes.items()}

    @classmethod
    def from_dict(cls, texts: Mapping[str, str]) -> Assignment:
        """The inverse of `to_dict`. Raises `BadInput` for anything that is not name -> text."""
        if not isinstance(texts, Mapping):
            raise BadInput("an assignment must be a mapping of layer name to scheme")
        schemes, trained = {}, {}
        for layer, text in texts.items():
            if not isinstance(layer, str) or not isinstance(text, str):
                raise BadInput(f"assignment entry {layer!r}: {text!r} must map a name to a scheme text")
            scheme, sign, digest = text.partition("#")
            schemes[layer] = parse_scheme(scheme)
            if sign:
                if not _DIGEST.fullmatch(digest):
                    raise BadInput(f"assignment entry {layer!r}: {digest[:80]!r} must be a digest of 40 hex digits")
                trained[layer] = digest
        return cls(schemes, trained)

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """The inverse of `json`. Raises `BadInput` for text that is not JSON of that form."""
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise BadInput(f"the assignment is not JSON: {problem}") from None
        return cls.from_dict(parsed)


def diff(a: Assignment, b: Assignment) -> dict[str, tuple[Scheme | None, Scheme | None]]:
    """Layers that differ in scheme or in what was trained of them, with the scheme of each side (None where a side
    lacks the layer)."""
    names = sorted({*a, *b})
    return {
        name: (a.get(name), b.get(name))
        for name in names
        if a.get(name) != b.get(name) or a.trained.get(name) != b.trained.get(name)
    }
