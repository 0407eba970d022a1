"""Workers: what evaluates, and what it is at."""

from __future__ import annotations

from fastapi import APIRouter, Response

from autoq.service.answers import answer
from autoq.service.context import Asks, Stored
from autoq.service.schemas import WorkersAnswer

router = APIRouter(prefix="/api/v1", tags=["server"])


@router.get("/workers", response_model=WorkersAnswer)
def list_workers(store: Stored, asker: Asks) -> Response:
    """The workers that were seen lately; of those that are at another user's study, not that study."""
    mine = None if asker.role == "admin" else store.feed.owned(asker.whose)
    shown = []
    for worker in store.queue.workers():
        told = worker.to_json()
        if mine is not None and worker.study_id not in mine:
            told |= {"study": None, "study_id": None, "trial": None}
        shown.append(told)
    return answer({"workers": shown})
