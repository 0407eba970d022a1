"""Rows of labelled examples from JSONL, CSV and datasets, and their two disjoint parts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoq.errors import DataRefused
from autoq.tasks import Examples, Row, Source
from autoq.user_path import user_path

_SUFFIXES = (".jsonl", ".csv")


def read_rows(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with the columns that are asked for under their own names, and its place for messages.

    `columns` maps each column that is needed to what it holds. Raises `DataRefused` with one line.
    """
    spec, path = source.spec, user_path(source.spec.source)
    if unknown := sorted(spec.columns.keys() - columns):
        raise DataRefused(f"{source.field}.columns: no column {unknown[0]!r}; choose from {', '.join(columns)}")
    named = {name: spec.columns.get(name, name) for name in columns}
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
    if len(unique) < wanted:
        raise DataRefused(
            f"{source.field}: {spec.source!r} has {len(unique)} examples that differ, and {wanted} are needed "
            f"(search_examples {spec.search_examples}, report_examples {spec.report_examples}): ask for fewer"
        )
    order = np.random.default_rng(source.seed).permutation(len(unique))[:wanted]
    drawn = [unique[i] for i in order]
    return Examples(drawn[: spec.search_examples], drawn[spec.search_examples :])
