"""Text and its disjoint parts: calibration, search, report, and what is left for recovery.

The text is tokenized once and cut into consecutive cells, each as long as one window holds. A
permutation drawn from `data.seed` shuffles the cells, so that each part is spread over the whole text
instead of lying in one chapter of it. The first cells become calibration windows, the next search
windows, the next report windows, and all others are free to train on. No token of the text is in two parts,
and a part never depends on how many tokens a later one asks for: more report tokens leave what was searched on
as it was.

Where the tokenizer frames a text with special tokens (a BOS, or [CLS] … [SEP]), every window is
framed likewise: models that were trained with them are far off without. They count as tokens of the
window; only text tokens are disjoint.
"""

from __future__ import annotations

import codecs
import importlib.util
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoq.calibration._contained import SAVED, check_saved, contained, plain_columns
from autoq.errors import DataRefused
from autoq.spec import DataSpec, TaskSpec
from autoq.user_path import user_path

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md")
MIN_WINDOW = 8

# A fixed cap, not one that follows the spec's token counts: it decides which cells there are, and so
# which windows are drawn. About two million tokens of English.
MAX_CHARACTERS = 8_000_000

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Parts:
    """Token ids of the three parts, each int64 of shape (windows, window)."""

    calibration: Tensor
    search: Tensor
    report: Tensor


def windows(spec: DataSpec, tokenizer: Any, max_positions: int | None) -> Parts:
    """Cut the spec's text into windows for a tokenizer and a model that reads `max_positions` tokens.

    A window has `window_tokens` tokens, fewer where the model reads fewer. A part has as many whole
    windows as its tokens allow; one that asks for less than a window gets one shorter window. Raises
    `DataRefused` for text that cannot be read or is too short.
    """
    cut = _cut(spec, tokenizer, max_positions)
    parts = {}
    start = 0
    for name, count in cut.counts.items():
        parts[name] = cut.framed(start, count, min(cut.window, getattr(spec, f"{name}_tokens")))
        start += count
    return Parts(**parts)


def recovery_windows(spec: DataSpec, tokenizer: Any, max_positions: int | None) -> Tensor:
    """The windows (n, window) that `windows` leaves: in no part, each of full length. May be none.

    Raises as `windows` does.
    """
    cut = _cut(spec, tokenizer, max_positions)
    taken = sum(cut.counts.values())
    return cut.framed(taken, len(cut.cells) - taken, cut.window)


@dataclass(frozen=True)
class _Cut:
    """A text in shuffled cells (n, cell), and how many of them each part takes, in this order."""

    cells: Tensor
    counts: dict[str, int]
    window: int
    prefix: Tensor
    suffix: Tensor

    def framed(self, start: int, count: int, window: int) -> Tensor:
        """Windows (count, window) of the cells from `start` on."""
        length = max(1, window - len(self.prefix) - len(self.suffix))
        drawn = self.cells[start : start + count, :length]
        return torch.cat([self.prefix.expand(count, -1), drawn, self.suffix.expand(count, -1)], dim=1)


def _cut(spec: DataSpec, tokenizer: Any, max_positions: int | None) -> _Cut:
    text = load_text(spec)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    prefix, suffix = _frame(tokenizer)
    window = spec.window_tokens if max_positions is None else min(spec.window_tokens, max_positions)
    cell = window - len(prefix) - len(suffix)
    if window < MIN_WINDOW or cell < 1:
        raise DataRefused(f"the model reads {max_positions} tokens at a time; a window needs {MIN_WINDOW}")

    wanted = {name: getattr(spec, f"{name}_tokens") for name in ("calibration", "search", "report")}
    for name, count in wanted.items():
        if count < MIN_WINDOW:
            raise DataRefused(f"data.{name}_tokens is {count}; the least is {MIN_WINDOW}")
    counts = {name: max(1, count // window) for name, count in wanted.items()}
    available = len(tokens) // cell
    if sum(counts.values()) > available:
        needed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataRefused(
            f"data source {spec.source!r} has {len(tokens)} tokens, which is {available} windows of {window}; "
            f"{sum(counts.values())} are needed ({needed}): ask for fewer tokens, for shorter windows "
            "(data.window_tokens), or give more text"
        )

    order = np.random.default_rng(spec.seed).permutation(available)
    cells = tokens[: available * cell].view(available, cell)[torch.from_numpy(order)]
    return _Cut(cells, counts, window, prefix, suffix)


def _frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The special tokens that the tokenizer puts before and after a text, as 1-D int64 tensors."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
    assert bare and start is not None, (bare, framed)
    before, after = framed[:start], framed[start + len(bare) :]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def load_text(spec: DataSpec) -> str:
    """The source's text, at most `MAX_CHARACTERS` of it from the start.

    `python-docs`, a text file, a folder of .txt and .md files (sorted by path), a saved or plain
    dataset folder, or the name of a Hugging Face dataset. Raises `DataRefused` with one line.
    """
    path = user_path(spec.source)
    if spec.source == PYTHON_DOCS:
        text = _python_docs()
    elif path.is_file():
        text = _join([path], _read_file)
    elif path.is_dir() and (files := _text_files(path)):
        text = _join(files, _read_file)
    elif path.is_dir() or (not path.exists() and _may_be_a_dataset(spec.source)):
        text = _join(_rows(spec, path), str)
    else:
        raise DataRefused(
            f"data source {spec.source!r}: there is no such file or folder, "
            f"and it is neither {PYTHON_DOCS} nor a datasets name"
        )
    if not text.strip():
        raise DataRefused(f"data source {spec.source!r} holds no text (0 characters)")
    return text


def _may_be_a_dataset(source: str) -> bool:
    """Whether a source that is not there may be a dataset's name, and not a file's that is mistyped."""
    return bool(_DATASET_NAME.fullmatch(source)) and not source.endswith(TEXT_SUFFIXES)


def _python_docs() -> str:
    """The reference prose that every CPython ships for its `help()`: about 465 000 characters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataRefused(
            f"data source {PYTHON_DOCS!r}: this Python came without pydoc_data; give a text file or a dataset"
        ) from None
    return _join((topics[name] for name in sorted(topics)), str)


def _text_files(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in SAVED):
        return []
    return sorted(file for file in folder.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())


def _join(sources: Iterable[Any], read: Callable[[Any], str]) -> str:
    """Texts one after another, a blank line between them, up to the cap."""
    texts: list[str] = []
    left = MAX_CHARACTERS
    for source in sources:
        if left <= 0:
            break
        texts.append(read(source)[:left])
        left -= len(texts[-1])
    return "\n\n".join(texts)


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            # A character takes up to four bytes, and the last one may be cut through.
            raw = opened.read(4 * MAX_CHARACTERS)
    except OSError as problem:
        raise DataRefused(f"data source {str(file)!r} cannot be read: {problem.strerror}") from None
    cut = len(raw) == 4 * MAX_CHARACTERS
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=not cut)
    except UnicodeDecodeError as problem:
        raise DataRefused(
            f"data source {str(file)!r} is not UTF-8 (byte {problem.start} of {len(raw)}): convert it first"
        ) from None


def _rows(spec: DataSpec, path: Path) -> Iterator[str]:
    """The texts of a dataset's column, row by row."""
    rows = open_dataset(spec, path, "data", f"give a text file, a dataset folder or {PYTHON_DOCS}", [spec.column])
    if spec.column not in rows.column_names:
        columns = ", ".join(sorted(rows.column_names)) or "(none)"
        raise DataRefused(f"data.column {spec.column!r} is not in {spec.source!r}; choose from {columns}")
    feature = rows.features[spec.column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise DataRefused(f"data.column {spec.column!r} of {spec.source!r} holds {feature}, not text")
    return (row for row in rows[spec.column] if row)


def open_dataset(
    spec: DataSpec | TaskSpec,
    path: Path,
    field: str,
    instead: str,
    wanted: Sequence[str],
    encoded: Sequence[str] = (),
) -> Any:
    """The split that the spec names, with its columns of plain values, of which the columns `wanted` must be.

    Columns `encoded` may hold images, whose cells then are their bytes or their path, not decoded. `field` is the
    spec's place in the study, for what `DataRefused` says, and `instead` what does without a network.
    """
    if importlib.util.find_spec("datasets") is None:
        extra = "images" if encoded else "datasets"
        raise DataRefused(f"{field} source {spec.source!r} needs the datasets package: pip install 'autoq[{extra}]'")
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    shown, verbosity = datasets.utils.logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        return plain_columns(datasets, _dataset(datasets, spec, path, field), wanted, field, encoded)
    except DataRefused:
        raise
    except Exception as problem:
        # Builders, the hub and the network raise some dozens of types; the user needs the reason.
        line = str(problem).partition("\n")[0] or type(problem).__name__
        raise DataRefused(
            f"{field} source {spec.source!r} cannot be loaded as a dataset: {line}; {instead} where there is no network"
        ) from problem
    finally:
        hub_logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _dataset(datasets: Any, spec: DataSpec | TaskSpec, path: Path, field: str) -> Any:
    """The split that the spec names, of a saved dataset, a folder of data files, or a hub dataset."""
    if path.is_dir() and any((path / name).is_file() for name in SAVED):
        check_saved(path)
        found = datasets.load_from_disk(str(path))
    elif path.is_dir():
        folder = path.resolve().as_posix()
        with contained(datasets, folder):
            found = datasets.load_dataset(folder, spec.config)
    elif (
        not _DATASET_NAME.fullmatch(spec.source) or spec.source in datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    ):
        # Such as `json`: to `datasets`, all files of that format in the current folder.
        raise DataRefused(f"{field} source {spec.source!r} is no dataset's name; give one such as Salesforce/wikitext")
    else:
        with contained(datasets, f"hf://datasets/{spec.source}"):
            found = datasets.load_dataset(spec.source, spec.config)
    if not isinstance(found, datasets.DatasetDict):
        return found
    if spec.split not in found:
        raise DataRefused(
            f"{field}.split {spec.split!r} is not in {spec.source!r}; choose from {', '.join(sorted(found))}"
        )
    return found[spec.split]
