"""All trials of a study, a page at a time.

A record with its measurements takes some six kilobytes, and with an assignment of 210 layers several times that. So
whoever needs something of each of a hundred thousand trials looks at them in pages and keeps what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoq.store import Store, TrialRecord, TrialState

PAGE = 1000  # trials


def each_trial(store: Store, study_id: int, states: Sequence[TrialState] | None = None) -> Iterator[TrialRecord]:
    """The trials of a study in the order of their numbers, those in one of `states`, without assignments.

    What another process changes meanwhile may show in later pages: it is for who runs the study, or for one that rests.
    """
    after: int | None = None
    while page := store.trials(study_id, states, after=after, limit=PAGE):
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1].number
