"""The trials of a study as columns: what figures are drawn from.

A record is an object of some 3 KB; a study of 100,000 trials would take 300 MB and seconds to walk through at every
figure. As columns it takes 60 bytes a trial and 25 for each measured value, and is read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from autoq.measurement import Part
from autoq.search.sampler_view import PREDICTED
from autoq.store import TrialRecord, TrialState
from autoq.store.loading import MeasurementRow, TrialRow
from autoq.store.records import Origin

STATES: tuple[TrialState, ...] = get_args(TrialState)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
KINDS = ("measured", "predicted", "computed")
PARTS: tuple[Part, ...] = ("report", "search")

ESTIMATE = "estimate"  # of a trial that was stopped: what all tokens would most likely have given
_STATE = {name: place for place, name in enumerate(STATES)}
_ORIGIN = {name: place for place, name in enumerate(ORIGINS)}
_KIND = {name: place for place, name in enumerate(KINDS)}

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Small = NDArray[np.int8]
Whole = NDArray[np.int64]

_BASE: Mapping[str, tuple[type, float]] = {
    "number": (np.int64, 0),
    "state": (np.int8, 0),
    "origin": (np.int8, 0),
    "feasible": (np.int8, -1),
    "on_frontier": (np.bool_, 0),
    "duplicate_of": (np.int64, -1),
    "created": (np.float64, np.nan),
    "finished": (np.float64, np.nan),
    "seconds": (np.float64, np.nan),
    "predicted": (np.float64, np.nan),
}
_MEASURED: Mapping[str, tuple[type, float]] = {
    "value": (np.float64, np.nan),
    "stderr": (np.float64, np.nan),
    "expected": (np.float64, np.nan),
    "kind": (np.int8, -1),
}
Measurable = tuple[str, Part]


@dataclass(frozen=True)
class Measured:
    """One objective on one part, (n,) each: NaN and kind -1 where a trial has none; `kind` indexes `KINDS`.

    `expected` is the value, and of a trial that was stopped early the estimate of what all tokens would have given.
    """

    value: Floats
    stderr: Floats
    expected: Floats
    kind: Small


@dataclass(frozen=True)
class Best:
    """One objective, on the report part where it is: as `Measured`, and `part` indexes `PARTS` (-1: none)."""

    value: Floats
    stderr: Floats
    kind: Small
    part: Small


class Trials:
    """Columns (n,) of the trials of one study, in the order of their numbers. Never changed: `merged` gives a new one.

    `number`, `state` (index into `STATES`), `origin` (into `ORIGINS`), `feasible` (1, 0, -1: not known), `on_frontier`,
    `duplicate_of` (-1: none), `created` and `finished` (seconds since 1970, NaN: not yet), `seconds`, and
    `predicted`, what the sampler expected of the study's quality. `baselines` maps numbers to names, `units`
    objectives to units.
    """

    number: Whole
    state: Small
    origin: Small
    feasible: Small
    on_frontier: Bools
    duplicate_of: Whole
    created: Floats
    finished: Floats
    seconds: Floats
    predicted: Floats

    def __init__(
        self,
        columns: Mapping[str, NDArray[np.generic]],
        measured: Mapping[Measurable, Mapping[str, NDArray[np.generic]]],
        baselines: Mapping[int, str],
        units: Mapping[str, str],
    ) -> None:
        self._columns, self._measured = columns, measured
        self.baselines, self.units = dict(baselines), dict(units)
        for name, column in columns.items():
            setattr(self, name, column)

    @classmethod
    def of(cls, records: Iterable[TrialRecord] = ()) -> Trials:
        """The columns of some records."""
        ordered = sorted(records, key=lambda trial: trial.number)
        rows = [
            (
                *(t.id, t.number, t.state, t.origin, t.baseline, t.duplicate_of, t.feasible, t.on_frontier),
                *(t.created_at, t.finished_at, t.seconds, _number(t.sampler_attrs.get(PREDICTED))),
            )
            for t in ordered
        ]
        measured = [
            (t.id, v.objective, v.part, v.kind, v.value, v.stderr, v.unit, _number(v.detail.get(ESTIMATE)))
            for t in ordered
            for v in t.measurements.values()
        ]
        return cls._of(rows, measured)

    @classmethod
    def of_rows(cls, rows: Iterable[TrialRow], measured: Iterable[MeasurementRow]) -> Trials:
        """The columns of what `Store.trial_columns` gives, in the order of the numbers."""
        return cls._of(
            [(*row[:-1], _within(row[-1], PREDICTED)) for row in rows],
            [(*row[:-1], _within(row[-1], ESTIMATE)) for row in measured],
        )

    @classmethod
    def _of(cls, rows: Sequence[TrialRow], measurements: Sequence[MeasurementRow]) -> Trials:
        """From rows whose last value is a number: what was predicted, and what a stopped trial is estimated at."""
        if not rows:
            return cls({name: _empty(kind, fill, 0) for name, (kind, fill) in _BASE.items()}, {}, {}, {})
        fields = [*zip(*rows, strict=True)]
        _, number, state, origin, baseline, duplicate, feasible, front, created, finished, seconds, predicted = fields
        columns = {
            "number": number,
            "state": [_STATE[each] for each in state],
            "origin": [_ORIGIN[each] for each in origin],
            "feasible": [-1 if each is None else int(each) for each in feasible],
            "on_frontier": front,
            "duplicate_of": [-1 if each is None else each for each in duplicate],
            "created": [each.timestamp() for each in created],
            "finished": [np.nan if each is None else each.timestamp() for each in finished],
            "seconds": [np.nan if each is None else each for each in seconds],
            "predicted": predicted,
        }
        places = {row[0]: place for place, row in enumerate(rows)}
        grouped: dict[Measurable, list[MeasurementRow]] = {}
        for row in measurements:
            grouped.setdefault((row[1], row[2]), []).append(row)
        measured: dict[Measurable, dict[str, NDArray[np.generic]]] = {}
        units: dict[str, str] = {}
        for key, group in grouped.items():
            ids, _, _, kinds, values, errors, unit, estimates = zip(*group, strict=True)
            units.setdefault(key[0], unit[0])
            place = np.array([places[each] for each in ids])
            arrays = measured[key] = {name: _empty(*kind, len(rows)) for name, kind in _MEASURED.items()}
            arrays["value"][place] = values
            arrays["stderr"][place] = [np.nan if each is None else each for each in errors]
            arrays["expected"][place] = np.where(np.isnan(estimates), values, estimates)
            arrays["kind"][place] = [_KIND[each] for each in kinds]
        return cls(
            {name: np.array(columns[name], dtype=kind) for name, (kind, _) in _BASE.items()},
            measured,
            {n: name for n, name in zip(number, baseline, strict=True) if name is not None},
            units,
        )

    def merged(self, newer: Trials) -> Trials:
        """These with those of `newer` beside them, or in their place where the number is the same."""
        if not len(newer) or not len(self):
            return newer if len(newer) else self
        kept = ~np.isin(self.number, newer.number)
        numbers = np.concatenate([self.number[kept], newer.number])
        order = np.argsort(numbers, kind="stable")

        def joined(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None, name: str) -> NDArray[np.generic]:
            kind, fill = _BASE.get(name) or _MEASURED[name]
            a = _empty(kind, fill, len(self)) if a is None else a
            b = _empty(kind, fill, len(newer)) if b is None else b
            whole: NDArray[np.generic] = np.concatenate([a[kept], b])[order]
            return whole

        columns = {name: joined(self._columns[name], newer._columns[name], name) for name in _BASE}
        measured = {
            key: {
                name: joined(self._measured.get(key, {}).get(name), newer._measured.get(key, {}).get(name), name)
                for name in _MEASURED
            }
            for key in dict.fromkeys([*self._measured, *newer._measured])
        }
        return Trials(columns, measured, self.baselines | newer.baselines, newer.units | self.units)

    def __len__(self) -> int:
        return len(self.number)

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take."""
        of_values = sum(array.nbytes for row in self._measured.values() for array in row.values())
        return of_values + sum(column.nbytes for column in self._columns.values())

    def states(self, *names: TrialState) -> Bools:
        """Which trials (n,) are in one of these states."""
        found: Bools = np.isin(self.state, [STATES.index(name) for name in names])
        return found

    @property
    def is_baseline(self) -> Bools:
        """Which trials (n,) are baselines."""
        found: Bools = np.isin(self.number, list(self.baselines))
        return found

    def measured(self, objective: str, part: Part) -> Measured:
        """One objective on one part; all NaN where nobody has it."""
        row = self._measured.get((objective, part))
        if row is None:
            row = {name: _empty(*kind, len(self)) for name, kind in _MEASURED.items()}
        return Measured(**row)  # type: ignore[arg-type]

    def best(self, objective: str) -> Best:
        """One objective, of each trial on the report part where it has it, else on the search part."""
        report, search = self.measured(objective, "report"), self.measured(objective, "search")
        reported, searched = report.kind >= 0, search.kind >= 0
        return Best(
            np.where(reported, report.value, search.value),
            np.where(reported, report.stderr, search.stderr),
            np.where(reported, report.kind, search.kind).astype(np.int8),
            np.where(reported, 0, np.where(searched, 1, -1)).astype(np.int8),
        )

    def place(self, number: int) -> int | None:
        """Where the trial of that number stands, None where there is none."""
        place = int(np.searchsorted(self.number, number))
        return place if place < len(self) and self.number[place] == number else None

    def label(self, number: int) -> str:
        """A baseline's name, `trial 12` for others."""
        return self.baselines.get(number, f"trial {number}")

    def complete(self, objectives: Sequence[str], part: Part = "search") -> Bools:
        """Which trials (n,) are complete and have a value of each objective."""
        found = self.states("complete")
        for name in objectives:
            found = found & (self.measured(name, part).kind >= 0)
        return found


def _empty(kind: type, fill: float, length: int) -> NDArray[np.generic]:
    return np.full(length, fill, dtype=kind)


def _within(text: str, key: str) -> float:
    """The number of that name in an object of JSON, NaN where there is none."""
    return _number(json.loads(text).get(key)) if key in text else float("nan")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
