"""The store: every study, trial, assignment and measurement, in SQLite or PostgreSQL.

    store = Store.open("autoq.db")
    study = store.study("smollm2-laptop")
    for trial in store.frontier(study.id): ...

Only a study's controller writes its trials; everyone else reads.
"""

from autoq.store.patience import Patience
from autoq.store.queue import Queue
from autoq.store.queue_records import ExportRecord, LeaseRecord, Prepared, WorkerRecord
from autoq.store.records import (
    Descent,
    Ending,
    NewTrial,
    Origin,
    StudyObjective,
    StudyRecord,
    StudyState,
    StudySummary,
    TrialError,
    TrialRecord,
    TrialState,
)
from autoq.store.store import Store

__all__ = [
    "Descent",
    "Ending",
    "ExportRecord",
    "LeaseRecord",
    "NewTrial",
    "Origin",
    "Patience",
    "Prepared",
    "Queue",
    "Store",
    "StudyObjective",
    "StudyRecord",
    "StudyState",
    "StudySummary",
    "TrialError",
    "TrialRecord",
    "TrialState",
    "WorkerRecord",
]
