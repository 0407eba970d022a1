"""What differs between two trials: layers, bytes, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from autoq.assignment import diff
from autoq.display import numbers
from autoq.display.tables import plain
from autoq.kv_cache import KeyValue
from autoq.layer import Layer

if TYPE_CHECKING:
    from autoq.store import StudyRecord, TrialRecord


def document(
    study: StudyRecord,
    a: TrialRecord,
    b: TrialRecord,
    layers: Mapping[str, Layer] | None,
    caches: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """The difference as one JSON document: `{"study", "a", "b", "layers", "measurements"}`.

    `layers` maps a layer to the scheme of each side (None: it is not in that assignment) and, where
    the shapes are known, to the bytes that ship. KV caches stand behind the layers, with the bytes that `caches` has
    of them.
    """
    assert a.assignment is not None
    assert b.assignment is not None
    differing: dict[str, dict[str, Any]] = {}
    for name, schemes in diff(a.assignment, b.assignment).items():
        cached = name in a.assignment.caches or name in b.assignment.caches
        sides = list(zip("ab", (a.assignment, b.assignment), schemes, strict=True))
        entry: dict[str, Any] = {
            side: own.short_text(name) if cached or name in own else None for side, own, _ in sides
        }
        for side, _, scheme in sides:
            if cached:
                entry |= {f"bytes_{side}": own[str(scheme)] for own in [(caches or {}).get(name)] if own}
            elif layers is not None and name in layers and scheme is not None and not isinstance(scheme, KeyValue):
                entry[f"bytes_{side}"] = layers[name].nbytes(scheme)
        differing[name] = entry
    ours, theirs = a.best_measurements(), b.best_measurements()
    return {
        "study": study.name,
        "a": a.number,
        "b": b.number,
        "layers": differing,
        "measurements": {
            name: {"a": ours[name].to_json(), "b": theirs[name].to_json()} for name in ours if name in theirs
        },
    }


def table(found: Mapping[str, Any]) -> list[RenderableType]:
    """The document of `document` for people."""
    a, b = f"trial {found['a']}", f"trial {found['b']}"
    layers: Mapping[str, Mapping[str, Any]] = found["layers"]
    if not layers:
        return [Text(f"{a} and {b} have the same assignment")]
    sized = all("bytes_a" in entry and "bytes_b" in entry for entry in layers.values())
    rows = [
        [name, entry["a"] or "", entry["b"] or ""]
        + ([_change(entry["bytes_b"] - entry["bytes_a"], "bytes")] if sized else [])
        for name, entry in layers.items()
    ]
    parts: list[RenderableType] = [plain(["layer", a, b, *(["bytes"] if sized else [])], rows, right=(3,))]
    parts.append(Text(f"\n{len(layers)} {'layer differs' if len(layers) == 1 else 'layers differ'}\n"))
    changes = []
    for name, pair in found["measurements"].items():
        left, right = (numbers.with_error(m["value"], m["stderr"], m["unit"]) for m in (pair["a"], pair["b"]))
        same_kind = (pair["a"]["kind"], pair["a"]["part"]) == (pair["b"]["kind"], pair["b"]["part"])
        same_kind = same_kind and not any("rival" in m["detail"] for m in pair.values())  # given up: fewer tokens
        change = _change(pair["b"]["value"] - pair["a"]["value"], pair["a"]["unit"]) if same_kind else "not comparable"
        unit = "" if pair["a"]["unit"] == "bytes" else pair["a"]["unit"]
        changes.append([name, left, right, change, unit])
    parts.append(plain(["objective", a, b, "change", ""], changes, right=(1, 2, 3)))
    return parts


def _change(value: float, unit: str) -> str:
    return ("+" if value > 0 else "") + numbers.number(value, unit)
