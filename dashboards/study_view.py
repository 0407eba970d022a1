"""From a store to figures: what is known of a study, read once and kept as columns.

    study_view.figure(store, study_id, "frontier", x="size_bytes", y="kl_nats_per_token")

gives one figure. Whoever asks more than once keeps a `View`: it reads only trials that have changed since.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from autoq.display.ties import stored_ties
from autoq.layer import Layer

from . import figures
from .columns import Trials
from .volume import Curve, sparkline

if TYPE_CHECKING:
    from autoq.store import Store, StudyRecord, TrialRecord

    from .figures import Figure

PAGE = 5000  # trials that are read at a time
MOST_TIED = 150  # frontier points that are compared in pairs
MOST_OTHERS = 8  # studies beside which one stands
T = TypeVar("T")


class View:
    """One study as figures see it. May be used by several threads; `refresh` brings it up to date.

    What it holds between calls: the columns of all trials, and what was derived from them.
    """

    def __init__(self, store: Store, study_id: int) -> None:
        self._store, self.id = store, study_id
        self._lock = threading.RLock()
        self._seen = -1
        self._study: StudyRecord | None = None
        self._trials = Trials.of()
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._curve: Curve | None = None
        self._others: dict[int, View] = {}

    def refresh(self) -> View:
        """Read what has changed. Raises `NotFound` where the study is gone."""
        with self._lock:
            study = self._store.study(self.id)
            if study.changes != self._seen:
                # Trials that change while they are read have a later count, and are read again next time.
                after: int | None = None
                while True:
                    rows, measured = self._store.trial_columns(self.id, after, PAGE, self._seen)
                    self._trials = self._trials.merged(Trials.of_rows(rows, measured))
                    if len(rows) < PAGE:
                        break
                    after = rows[-1][1]
                self._seen = study.changes
            self._study = study
        return self

    def figure(self, name: str, **options: object) -> Figure:
        """One figure of the study as it stands. Raises `UnknownName` and `BadInput` for what it does not know."""
        with self._lock:
            return figures.build(self.refresh(), name, options)

    # What figures ask for; see `figures.Facts`

    @property
    def study(self) -> StudyRecord:
        """The study itself."""
        if self._study is None:
            self.refresh()
        assert self._study is not None
        return self._study

    @property
    def trials(self) -> Trials:
        """All its trials as columns."""
        if self._study is None:
            self.refresh()
        return self._trials

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The model's layers by name; empty where the study has not stored them."""

        def read() -> dict[str, Layer]:
            table: Mapping[str, Mapping[str, Any]] = self._store.table(self.id, "layers") or {}
            return {name: Layer(**{**facts, "tied": tuple(facts.get("tied", ()))}) for name, facts in table.items()}

        return self._cached("layers", bool, read)

    @property
    def sensitivity(self) -> Mapping[str, Mapping[str, float]]:
        """Layer -> scheme -> predicted loss; empty where nothing was predicted."""
        return self._cached("sensitivity", bool, lambda: self._store.table(self.id, "sensitivity") or {})

    def _cached(self, name: str, final: Callable[[Any], bool], read: Callable[[], T]) -> T:
        """What `read` gives, kept for good once it is `final`, else until the study changes."""
        key, value = self._kept.get(name, (None, None))
        if key != "final" and (key is None or key != self._seen):
            value = read()
            self._kept[name] = ("final" if final(value) and self.study.state == "finished" else self._seen, value)
        found: T = value
        return found

    def trial(self, number: int) -> TrialRecord:
        """One trial with its assignment. Raises `NotFound`."""
        return self._store.trial(self.id, number)

    def _frontier(self) -> list[TrialRecord]:
        return self._cached("frontier", lambda _: False, lambda: self._store.frontier(self.id))

    def records(self, numbers: Sequence[int]) -> list[TrialRecord]:
        """These trials without their assignments, in this order."""
        found = {trial.number: trial for trial in self._frontier()}
        missing = [number for number in numbers if number not in found]
        found |= {number: self._store.trial(self.id, number, with_assignments=False) for number in missing}
        return [found[number] for number in numbers]

    def ties(self) -> Mapping[int, Sequence[int]] | None:
        """Frontier point -> those that it has no advantage over; None where the frontier is too large to tell."""
        if int(self.trials.on_frontier.sum()) > MOST_TIED:
            return None
        points = self._frontier()
        key = tuple((trial.number, trial.changed) for trial in points)
        if self._kept.get("ties", (None, None))[0] != key:
            self._kept["ties"] = (key, stored_ties(self._store, self.study, points))
        found: Mapping[int, Sequence[int]] = self._kept["ties"][1]
        return found

    def volume(self) -> Curve:
        """The hypervolume of the trials so far."""
        self._curve = Curve.of(self.study.objectives, self.trials, self._curve)
        return self._curve

    def sparkline(self) -> dict[str, object]:
        """The hypervolume in at most 60 numbers and as an SVG path, for a list: `{"values", "path"}`."""
        with self._lock:
            return sparkline(self.refresh().volume().share.tolist())

    def other(self, study: str) -> View:
        """Another study of the same database. Raises `NotFound`."""
        found = self._store.study(study).id
        if found == self.id:
            return self
        # The ones that were compared last stay, and need not be read again.
        view = self._others.pop(found, None) or View(self._store, found)
        self._others[found] = view
        while len(self._others) > MOST_OTHERS:
            del self._others[next(iter(self._others))]
        return view.refresh()


def figure(store: Store, study_id: int, name: str, **options: object) -> Figure:
    """One figure of a study. Raises `UnknownName` with the choices for a figure, an option, an objective or a scheme
    that is not there, `BadInput` for other values, `NotFound` for studies and trials."""
    return View(store, study_id).figure(name, **options)
