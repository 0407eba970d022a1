"""Datasets that stay where they are: nothing that one says of itself leads out of its folder or repository.

A folder of data files, and a dataset on the hub, has a card (README.md) whose YAML names the data files of each of
its configurations. `datasets` takes any name there: `/etc/passwd`, `../../other`, `https://10.0.0.1/`, and
`zip://a::http://…`. A saved dataset names its Arrow files and its splits' folders likewise. Whoever may put a dataset
into a folder that a server reads, or on the hub, could so have it read the server's files and ask its neighbours.

All such names are resolved by one function of `datasets`, which is wrapped here, because only there it is known what
they resolve to before anything is opened or asked. Columns that are no text but name files or addresses to decode
(images, sound, PDF) are left out by `plain_columns` before a row is read; of a column of images that is wanted, the
cells are left as they are stored, for `autoq.calibration.images` to judge.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from autoq.errors import DataRefused

_DICT, _STATE = "dataset_dict.json", "state.json"
SAVED = (_STATE, _DICT)
_MAX_BYTES = 1 << 22  # of the JSON that lists a saved dataset's files
_ROOT: ContextVar[str | None] = ContextVar("autoq_dataset_root", default=None)
_LOCK = threading.Lock()


@contextlib.contextmanager
def contained(datasets: Any, root: str) -> Iterator[None]:
    """Within it, data files are resolved below `root` alone, a folder or a `hf://` address. What leads out raises
    `DataRefused`."""
    with _LOCK:
        current = datasets.data_files.resolve_pattern
        if not hasattr(current, "autoq_contained"):
            datasets.data_files.resolve_pattern = _guard(current)
    token = _ROOT.set(root.rstrip("/"))
    try:
        yield
    finally:
        _ROOT.reset(token)


def _guard(resolve: Any) -> Any:
    @functools.wraps(resolve)
    def guarded(pattern: str, base_path: str, *more: Any, **options: Any) -> list[str]:
        root = _ROOT.get()
        if root is not None and not (_below(base_path, root) and _below(_joined(pattern, base_path), root)):
            raise DataRefused(f"the dataset names data outside of itself ({pattern[:200]!r}), which is never read")
        found: list[str] = resolve(pattern, base_path, *more, **options)
        return found

    guarded.autoq_contained = True  # type: ignore[attr-defined]
    return guarded


def _joined(pattern: str, base_path: str) -> str:
    """Where a pattern leads, as `datasets` joins it: relative ones only are put below their base."""
    return pattern if pattern.startswith("/") or "://" in pattern else f"{base_path}/{pattern}"


def _below(place: str, root: str) -> bool:
    """Whether a path or address is `root` or below it, by its text. A hub's address may go on with a revision."""
    if "::" in place or "\\" in place or ".." in place.split("/"):
        return False
    own = place.startswith((f"{root}/", f"{root}@")) if root.startswith("hf://") else place.startswith(f"{root}/")
    return place.rstrip("/") == root or own


def check_saved(folder: Path) -> None:
    """Raise `DataRefused` where a saved dataset names files or splits that are not right in its folder."""
    if not (folder / _DICT).is_file():
        _check_state(folder)
        return
    for split in _names(_read(folder / _DICT).get("splits"), _DICT):
        _check_state(folder / split)


def _check_state(folder: Path) -> None:
    listed = _read(folder / _STATE).get("_data_files")
    entries = [each.get("filename") if isinstance(each, dict) else None for each in listed or ()]
    _names(entries, _STATE)


def _read(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a saved dataset; empty where it is none: `datasets` says what is wrong."""
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        raw = opened.read(_MAX_BYTES + 1)
    try:
        tree = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise DataRefused(f"{file.name} is not a saved dataset's: it is no JSON object of at most {_MAX_BYTES} bytes")
    return tree


def _names(names: Any, file: str) -> list[str]:
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or name == "..":
            raise DataRefused(
                f"the dataset names data outside of itself ({name!r:.200} in {file}), which is never read"
            )
    return list(names) if isinstance(names, list) else []


def plain_columns(datasets: Any, rows: Any, wanted: Sequence[str], field: str, encoded: Sequence[str] = ()) -> Any:
    """The rows without columns whose values name files or addresses that reading them would open; where some are wanted
    `encoded`, columns of images stay, as bytes or paths. Raises `DataRefused` where one of `wanted` is such a column.
    """
    decoded = []
    for name, feature in dict(rows.features or {}).items():
        if not datasets.features.features.require_decoding(feature, ignore_decode_attribute=True):
            continue
        if encoded and isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif name in (*wanted, *encoded):
            kind, instead = type(feature).__name__, "images" if name in encoded else "text"
            raise DataRefused(f"{field}: column {name!r} holds {kind}, which is never decoded; give {instead}")
        else:
            decoded.append(name)
    return rows.remove_columns(decoded) if decoded else rows
