"""Exports: ask for one, follow it, take it away."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from autoq import documents, plugins
from autoq.errors import Conflict, NotFound, UnknownName
from autoq.service import archive
from autoq.service.answers import answer, tagged
from autoq.service.auth import Asker
from autoq.service.context import WAKES, Asks, Configured, Stored, Visible
from autoq.service.exporting import name_of
from autoq.service.requests import ExportBody
from autoq.service.schemas import ExportsAnswer, ExportShape
from autoq.store import ExportRecord, Store

router = APIRouter(prefix="/api/v1", tags=["exports"])

Id = Annotated[int, Path(ge=0, le=2**31 - 1, description="An export's id.")]
_TAR: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}
}
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has is still so"}}


def _export(store: Store, asker: Asker, export_id: int) -> ExportRecord:
    found = store.queue.export(export_id)
    if not asker.sees(store.study(found.study_id).owner):
        raise NotFound(f"no export {export_id}")
    return found


@router.post("/studies/{study}/exports", response_model=ExportShape, status_code=201, dependencies=[WAKES])
def create_export(store: Stored, settings: Configured, asker: Asks, study: Visible, body: ExportBody) -> Response:
    """Queue an export of a trial. What is there already, or on its way, is given back as it is."""
    record = store.study(study.id)
    targets = [name.replace("_", "-") for name in plugins.names("targets")]
    if body.target is not None and body.target not in targets:
        raise UnknownName("target", body.target[:80], targets)
    trial = documents.named_trial(store, record, str(body.trial))
    limit = settings.limits.waiting_exports
    return answer(store.queue.add_export(study.id, trial.number, body.target, asker.user, limit).to_json(), 201)


@router.get("/studies/{study}/exports", response_model=ExportsAnswer, responses=_UNCHANGED)
def list_study_exports(request: Request, store: Stored, study: Visible) -> Response:
    """The exports of a study."""

    def make() -> dict[str, Any]:
        return {"exports": [export.to_json() for export in store.queue.exports(study.id)]}

    return tagged(request, (study.id, study.changes), make)


@router.get("/exports", response_model=ExportsAnswer)
def list_exports(store: Stored, asker: Asks) -> Response:
    """The exports of the studies that the asker may see."""
    found = store.queue.exports()
    mine = None if asker.role == "admin" else store.feed.owned(asker.whose)
    shown = [export for export in found if mine is None or export.study_id in mine]
    return answer({"exports": [export.to_json() for export in shown]})


@router.get("/exports/{export}", response_model=ExportShape)
def get_export(store: Stored, asker: Asks, export: Id) -> Response:
    """One export: how far it is, and once it is finished what it holds and what verification found."""
    return answer(_export(store, asker, export).to_json())


@router.get("/exports/{export}/download", response_class=Response, responses=_TAR)
def download_export(store: Stored, settings: Configured, asker: Asks, export: Id) -> Response:
    """A finished export as one tar file."""
    found = _export(store, asker, export)
    folder = None if settings.exports is None else settings.exports / str(found.id)
    if found.state != "finished" or folder is None or not folder.is_dir():
        raise Conflict(f"export {export} is {found.state}; only a finished one can be downloaded")
    name = name_of(found)
    files = archive.plan(folder, name)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.tar"',
        "Content-Length": str(archive.length(files)),
        "Cache-Control": "no-store",
    }
    return StreamingResponse(archive.content(files), 200, headers, "application/x-tar")
