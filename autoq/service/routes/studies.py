"""Studies."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from autoq.service.context import Stored

router = APIRouter(prefix="/api/v1/studies", tags=["studies"])


@router.get("")
def studies(store: Stored) -> dict[str, Any]:
    """All studies, oldest first."""
    return {"studies": [study.to_json() for study in store.studies()]}
