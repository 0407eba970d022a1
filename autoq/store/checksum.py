"""Checksums: what was acknowledged is what is read, or it is refused.

SQLite's pages have no checksums, so a bit that a disk has turned in the middle of a number is another number, and
nothing would tell. So there are three of our own, all written in the transaction that wrote what they cover:

- A trial that has ended carries a hash (BLAKE2b, 16 bytes) of what identifies it, of how it ended and of all its
  measurements. It is checked whenever they are read, as records or as columns. A trial of an older schema has none
  until its measurements change.
- A study carries the count of its frontier's members and a hash of their ids and points (`members_checksum`).
- JSON that is under neither of them (specs, plans, tables) is sealed: a CRC-32 in sixteen characters of whitespace
  behind the value, where JSON allows any (RFC 8259, section 2), so whoever else reads it reads the same value. Text
  without a seal is of an older version and is read as it is.

Assignments and values per token are compressed by zlib, which has a checksum of its own; trained layers are named by
their digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from autoq.measurement import Measurement

FIELDS = (
    *("number", "state", "origin", "baseline", "hash", "duplicate_of", "attempt", "feasible", "violations"),
    *("error_type", "error_message", "seconds", "parent"),
)
# What can be done about what does not hold; the end of every refusal of it.
WAY_OUT = "go back to a copy of the database, or copy what is whole with: autoq copy NEW --rescue"
_WHITE = " \t\n\r"  # JSON's whitespace: two bits each
_FOUR = ["".join(_WHITE[byte >> shift & 3] for shift in (0, 2, 4, 6)) for byte in range(256)]


def checksum(trial: Mapping[str, Any], measurements: Iterable[Measurement]) -> str:
    """The hash of a trial, from its columns by the names in `FIELDS`, and its measurements in any order."""
    return checksum_of_rows(own_of(trial), map(row_of, measurements))


def own_of(trial: Mapping[str, Any]) -> list[Any]:
    """What `checksum_of_rows` takes of a trial."""
    return [trial.get(name) for name in FIELDS]


def row_of(m: Measurement) -> tuple[Any, ...]:
    """What `checksum_of_rows` takes of a measurement."""
    return (
        m.objective,
        m.part,
        m.kind,
        m.value,
        m.stderr,
        m.unit,
        m.n,
        m.device,
        json.dumps(dict(m.detail)) if m.detail else "{}",
    )


def checksum_of_rows(own: Sequence[Any], measured: Iterable[Sequence[Any]]) -> str:
    """The same, from values in the order of `FIELDS` and measurements as (objective, part, kind, value, standard error,
    unit, n, device, detail as `json.dumps` writes it).

    What is hashed is the JSON of [own, [[objective, part, the measurement's JSON], …]], put together by hand: with a
    large study it is made a hundred thousand times.
    """
    number, state, origin, baseline, digest, duplicate_of, attempt, feasible, violations, *ended = own
    kind, message, seconds, parent = ended
    told = (
        f"[{_number(number)}, {_named(state)}, {_named(origin)}, {_named(baseline)}, {_named(digest)}, "
        f"{_number(duplicate_of)}, {_number(attempt)}, {_named(feasible)}, "
        f"{json.dumps(violations) if violations else '{}'}, {_named(kind)}, {_named(message)}, "
        f"{'null' if seconds is None else repr(float(seconds))}, {_number(parent)}]"
    )
    listed = sorted([(row[0], row[1], _text(row)) for row in measured])
    texts = [f"[{_named(objective)}, {_named(part)}, {_quoted(text)}]" for objective, part, text in listed]
    return hashlib.blake2b(f"[{told}, [{', '.join(texts)}]]".encode(), digest_size=16).hexdigest()


def _number(value: int | None) -> str:
    return "null" if value is None else repr(value)


def _text(row: Sequence[Any]) -> str:
    """A measurement as `json.dumps` writes what `Measurement.to_json` says."""
    _, part, kind, value, stderr, unit, n, device, detail = row
    error = "null" if stderr is None else repr(float(stderr))
    return (
        f'{{"value": {float(value)!r}, "stderr": {error}, "unit": {_named(unit)}, "kind": {_named(kind)}, '
        f'"part": {_named(part)}, "n": {n!r}, "device": {_named(device)}, "detail": {detail}}}'
    )


@functools.lru_cache(maxsize=4096)
def _named(text: Any) -> str:
    """JSON of what comes in few kinds: names, units, devices."""
    return json.dumps(text)


@functools.lru_cache(maxsize=4096)
def spaced(text: str) -> str:
    """Stored JSON as `json.dumps` writes it. Most details are empty, and many are alike."""
    return "{}" if text == "{}" else json.dumps(json.loads(text))


def members_checksum(study_id: int, members: Iterable[tuple[int, str]]) -> str:
    """The count of a frontier's members, a colon and the hash of their (trial id, stored point)."""
    listed = [f"{trial} {point}" for trial, point in sorted(members)]
    text = "\n".join([f"study {study_id}", *listed])
    return f"{len(listed)}:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def sealed(text: str) -> str:
    """JSON text with its seal behind it."""
    a, b, c, d = zlib.crc32(text.encode()).to_bytes(4, "little")
    return f"{text}{_FOUR[a]}{_FOUR[b]}{_FOUR[c]}{_FOUR[d]}"


def unsealed(text: str) -> str:
    """The JSON text of what `sealed` gave, or of one that was never sealed. Raises `ValueError` for another one."""
    if not isinstance(text, str):  # SQLite says what kind each value is, in a byte that may turn as any other
        raise ValueError("bytes where a text was stored")
    body = text.rstrip(_WHITE)
    if len(body) != len(text) and sealed(body) != text:
        raise ValueError(f"{body[:60]!r} is not what was stored")
    return body
