"""The checksum of a trial's result: what was acknowledged is what is read, or it is refused.

SQLite's pages have no checksums, so a bit that a disk has turned in the middle of a number is another number, and
nothing would tell. A trial that has ended carries a hash (BLAKE2b, 16 bytes) of what identifies it, of how it ended and
of all its measurements, written in the transaction that wrote them and checked whenever they are read as records. A
trial of an older schema has none until its measurements change. Assignments and values per token are compressed by
zlib, which has a checksum of its own; trained layers are named by their digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from autoq.measurement import Measurement

FIELDS = (
    *("number", "state", "origin", "baseline", "hash", "duplicate_of", "attempt", "feasible", "violations"),
    *("error_type", "error_message", "seconds", "parent"),
)


def checksum(trial: Mapping[str, Any], measurements: Iterable[Measurement]) -> str:
    """The hash of a trial, from its columns by the names in `FIELDS`, and its measurements in any order."""
    own = [trial.get(name) for name in FIELDS]
    own[FIELDS.index("violations")] = trial.get("violations") or {}
    own[FIELDS.index("seconds")] = _float(trial.get("seconds"))
    measured = sorted(
        (m.objective, m.part, json.dumps({**m.to_json(), "value": float(m.value), "stderr": _float(m.stderr)}))
        for m in measurements
    )
    return hashlib.blake2b(json.dumps([own, measured]).encode(), digest_size=16).hexdigest()


def _float(value: float | None) -> float | None:
    """The number as the database gives it back."""
    return None if value is None else float(value)
