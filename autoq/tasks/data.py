"""Rows of labelled examples from JSONL, CSV and datasets, and their two disjoint parts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoq.errors import DataRefused
from autoq.layer import ModelInfo
from autoq.tasks import Examples, Row, Source
from autoq.user_path import user_path

_SUFFIXES = (".jsonl", ".csv")
Check = Callable[[Row, ModelInfo], Row]


def read_rows(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with the columns that are asked for under their own names, and its place for messages.

    `columns` maps each column that is needed to what it holds. Raises `DataRefused` with one line.
    """
    spec, path = source.spec, user_path(source.spec.source)
    named = _named(source, columns)
    if path.is_file() and path.suffix in _SUFFIXES:
        rows = (_json_lines if path.suffix == ".jsonl" else _csv)(source, path)
    elif path.is_file() or path.suffix in _SUFFIXES:
        what = "is neither" if path.is_file() else "is not there; give"
        raise DataRefused(f"{source.field}.source: {spec.source!r} {what} a .jsonl {_or(path)} a .csv file")
    else:
        rows = _dataset(source, path, list(named.values()))
    for place, row in rows:
        for name, theirs in named.items():
            if theirs not in row:
                has = ", ".join(sorted(map(str, row)))[:200] or "none"
                raise DataRefused(
                    f"{source.field}.columns: {spec.source!r}, {place}, has no column {theirs!r} ({columns[name]}); it "
                    f"has {has}: say columns: {{{name}: ITS NAME}}"
                )
        yield place, {name: row[theirs] for name, theirs in named.items()}


def _named(source: Source, columns: Mapping[str, str]) -> dict[str, str]:
    """What the source calls each of the columns that are needed. Raises `DataRefused`."""
    if unknown := sorted(source.spec.columns.keys() - columns):
        raise DataRefused(f"{source.field}.columns: no column {unknown[0]!r}; choose from {', '.join(columns)}")
    return {name: source.spec.columns.get(name, name) for name in columns}


def _or(path: Path) -> str:
    return "nor" if path.is_file() else "or"


def _text(source: Source, path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise DataRefused(f"{source.field}.source: {str(path)!r} cannot be read: {problem.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataRefused(
            f"{source.field}.source: {str(path)!r} is not UTF-8 (byte {problem.start} of {len(raw)}): convert it first"
        ) from None


def _json_lines(source: Source, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: JSON may hold U+2028 and its like within a line.
    for number, line in enumerate(_text(source, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataRefused(f"{source.field}.source: {str(path)!r}, line {number}, is not JSON: {problem}") from None
        if not isinstance(row, dict):
            raise DataRefused(f"{source.field}.source: {str(path)!r}, line {number}, is no JSON object")
        yield f"line {number}", row


def _csv(source: Source, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(source, path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataRefused(
                    f"{source.field}.source: {str(path)!r}, line {reader.line_num}, has other fields than the header"
                )
            yield f"line {reader.line_num}", dict(row)
    except csv.Error as problem:
        raise DataRefused(
            f"{source.field}.source: {str(path)!r}, line {reader.line_num}, is not CSV: {problem}"
        ) from None


def _dataset(source: Source, path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from autoq.calibration.text import open_dataset

    found = open_dataset(source.spec, path, source.field, "give a .jsonl or .csv file", wanted)
    return ((f"row {number}", row) for number, row in enumerate(found))


def split(source: Source, rows: Sequence[Row]) -> Examples:
    """The parts of a task: rows in an order drawn from the seed, each once. Raises `DataRefused` for too few."""
    spec = source.spec
    unique = list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values())
    wanted = spec.search_examples + spec.report_examples
    refuse_too_few(source, len(unique))
    order = np.random.default_rng(source.seed).permutation(len(unique))[:wanted]
    drawn = [unique[i] for i in order]
    return Examples(drawn[: spec.search_examples], drawn[spec.search_examples :])


def refuse_too_few(source: Source, available: int) -> None:
    """Raise `DataRefused` where a task asks for more examples than its source has."""
    spec = source.spec
    if available < spec.search_examples + spec.report_examples:
        raise DataRefused(
            f"{source.field}: {spec.source!r} has {available} examples that differ, and "
            f"{spec.search_examples + spec.report_examples} are needed (search_examples {spec.search_examples}, "
            f"report_examples {spec.report_examples}): ask for fewer"
        )


def read_images(source: Source, columns: Mapping[str, str], info: ModelInfo, check: Check) -> Examples:
    """Both parts of a task of images, `columns["image"]`, drawn as `autoq.calibration.images` says; no more rows are
    read than that takes. A row has its image as bytes, decoded once to be sure, and its `place`.

    `check` is `TaskKind.check`, which raises `ValueError`. Raises `DataRefused` with one line.
    """
    from autoq.calibration import images

    assert info.images is not None
    spec = source.spec
    named = _named(source, columns)
    wanted = spec.search_examples + spec.report_examples
    images.fits(wanted, info.images, source.field)
    others = {name: theirs for name, theirs in named.items() if name != "image"}
    drawn = images.Rows(spec, source.field, named["image"], source.seed, list(others.values()))
    found: list[Row] = []
    for each in drawn:
        if len(found) == wanted:
            break
        row = {"image": each.content, "place": each.place}
        row |= {
            name: _class_name(drawn.rows.features[theirs], each.others[theirs], info) for name, theirs in others.items()
        }
        try:
            images.decoded(each.content, info.images.channels)
            found.append(check(row, info))
        except ValueError as problem:
            raise DataRefused(f"{source.field}: {spec.source!r}, {each.place}: {problem}") from None
    refuse_too_few(source, len(found))
    return Examples(found[: spec.search_examples], found[spec.search_examples :])


def _class_name(feature: Any, value: Any, info: ModelInfo) -> Any:
    """A number that the dataset has a name for as that name, where the names are the model's too: a folder of images
    numbers its classes by their names' order, and the model in its own."""
    names = getattr(feature, "names", None)
    if not isinstance(names, list) or not isinstance(value, int) or not 0 <= value < len(names):
        return value
    return names[value] if set(names) & set(info.labels) else value
