"""Assignments: a scheme for every layer, with one canonical text and one hash.

A layer that was trained, or quantized after those before it, is not determined by its scheme: it is named by the digest
of its tensors besides, and its entry reads `rtn-int3-g64#DIGEST`. So a trained assignment has a hash of its own, though
its schemes are another's.
A KV cache has an entry only where it is quantized, by the name of its attention module: `kv4`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping

from autoq.errors import BadInput
from autoq.kv_cache import KeyValue, parse_key_value
from autoq.scheme import Keep, Scheme, parse_scheme

_DIGEST = re.compile(r"[0-9a-f]{40}")
_SHOWN = 8  # digits of a digest that people compare


class Assignment(Mapping[str, Scheme]):
    """Layer name -> scheme, immutable and hashable by content.

    `trained` maps those layers whose tensors were trained, or made in sequence, to the digest of these tensors.
    `caches` maps the KV caches that are quantized to their schemes; as a mapping the assignment is one of layers alone.
    """

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        trained: Mapping[str, str] | None = None,
        caches: Mapping[str, KeyValue] | None = None,
    ) -> None:
        self._schemes = dict(sorted(schemes.items()))
        self.caches: Mapping[str, KeyValue] = dict(sorted((caches or {}).items()))
        assert not self.caches.keys() & self._schemes.keys(), "a name is a layer's or a cache's"
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
        return isinstance(other, Assignment) and self._content == other._content

    @property
    def _content(self) -> tuple[object, ...]:
        return self._schemes, self.trained, self.caches

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
        """What the layer is made of: its scheme, and where it was trained the digest of its tensors. Of a name that
        is no layer's, how the KV cache of that name is kept."""
        if layer not in self._schemes:
            return str(self.caches.get(layer, Keep()))
        scheme, digest = str(self._schemes[layer]), self.trained.get(layer)
        return scheme if digest is None else f"{scheme}#{digest}"

    def short_text(self, layer: str) -> str:
        """The same for people, with the first digits of the digest."""
        scheme, sign, digest = self.text(layer).partition("#")
        return scheme + sign + digest[:_SHOWN]

    def to_dict(self) -> dict[str, str]:
        """Name of a layer or of a quantized cache -> text, sorted by name."""
        if self.trained or self.caches:
            return {name: self.text(name) for name in self._names}
        # A few schemes stand for hundreds of layers, and putting their text together takes longer than all else.
        texts = {id(scheme): scheme for scheme in self._schemes.values()}
        shown = {key: str(scheme) for key, scheme in texts.items()}
        return {name: shown[id(scheme)] for name, scheme in self._schemes.items()}

    @property
    def _names(self) -> list[str]:
        return sorted([*self._schemes, *self.caches]) if self.caches else list(self._schemes)

    def untrained(self) -> dict[str, str]:
        """Name of a layer or of a quantized cache -> scheme text, whatever was trained."""
        return {name: self.text(name).partition("#")[0] for name in self._names}

    @classmethod
    def from_dict(cls, texts: Mapping[str, str]) -> Assignment:
        """The inverse of `to_dict`. Raises `BadInput` for anything that is not name -> text."""
        if not isinstance(texts, Mapping):
            raise BadInput("an assignment must be a mapping of layer name to scheme")
        schemes, trained, caches = {}, {}, {}
        for layer, text in texts.items():
            if not isinstance(layer, str) or not isinstance(text, str):
                raise BadInput(f"assignment entry {layer!r}: {text!r} must map a name to a scheme text")
            if (cached := parse_key_value(text)) is not None:
                caches[layer] = cached
                continue
            scheme, sign, digest = text.partition("#")
            schemes[layer] = parse_scheme(scheme)
            if sign:
                if not _DIGEST.fullmatch(digest):
                    raise BadInput(f"assignment entry {layer!r}: {digest[:80]!r} must be a digest of 40 hex digits")
                trained[layer] = digest
        return cls(schemes, trained, caches)

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """The inverse of `json`. Raises `BadInput` for text that is not JSON of that form."""
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise BadInput(f"the assignment is not JSON: {problem}") from None
        return cls.from_dict(parsed)


def diff(a: Assignment, b: Assignment) -> dict[str, tuple[Scheme | KeyValue | None, Scheme | KeyValue | None]]:
    """Layers that differ in scheme or in what was trained of them, with the scheme of each side (None where a side
    lacks the layer); then KV caches that are kept differently."""
    names = sorted({*a, *b})
    found: dict[str, tuple[Scheme | KeyValue | None, Scheme | KeyValue | None]] = {
        name: (a.get(name), b.get(name))
        for name in names
        if a.get(name) != b.get(name) or a.trained.get(name) != b.trained.get(name)
    }
    for name in sorted({*a.caches, *b.caches}):
        sides = a.caches.get(name, Keep()), b.caches.get(name, Keep())
        if sides[0] != sides[1]:
            found[name] = sides
    return found
