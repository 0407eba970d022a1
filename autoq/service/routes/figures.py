"""Figures of a study as data, its trials by columns, and what the list of studies shows of each."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from autoq.errors import NotFound
from autoq.service.answers import tagged
from autoq.service.context import Asks, Stored, Visible
from autoq.service.schemas import FigureAnswer, OverviewAnswer, PointsAnswer

if TYPE_CHECKING:
    from autoq.service.auth import Asker
    from autoq.store import Store

router = APIRouter(prefix="/api/v1/studies/{study}", tags=["figures"])

_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has is still so"}}
_HTML: dict[int | str, dict[str, Any]] = _UNCHANGED | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}


def _dashboard(module: str) -> Any:
    return importlib.import_module(f"autoq.dashboards.{module}")


_KEPT = 32  # studies whose columns are kept between requests


class FigureViews:
    """The studies that were looked at last, as columns. Used by many threads."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._views: OrderedDict[int, Any] = OrderedDict()

    def of(self, study_id: int) -> Any:
        """The view of a study, which reads what has changed when it is asked."""
        make = _dashboard("study_view").View
        with self._lock:
            view = self._views.setdefault(study_id, make(self._store, study_id))
            self._views.move_to_end(study_id)
            while len(self._views) > _KEPT:
                self._views.popitem(last=False)
            return view


def _view(request: Request, store: Store, study_id: int) -> Any:
    state = request.app.state
    if not hasattr(state, "figure_views"):
        state.figure_views = FigureViews(store)
    views: FigureViews = state.figure_views
    return views.of(study_id)


def _check_others(store: Store, asker: Asker, names: str) -> None:
    """Raise `NotFound` for a study among `names` that this one may not see."""
    for name in names.split(",")[:64]:
        found = store.feed.stamp(name.strip())
        if name.strip() and (found is None or not asker.sees(found.owner)):
            raise NotFound(f"no study {name.strip()[:128]!r}")


@router.get("/figures/{name}", response_model=FigureAnswer, responses=_UNCHANGED)
def get_figure(request: Request, store: Stored, study: Visible, asker: Asks, name: str) -> Response:
    """One figure: a picture in Plotly's JSON schema, and the table of the same numbers.

    What a figure can be asked for besides (`?x=size_bytes&y_scale=log`) is its own; a name that it does not know is
    answered with the choices.
    """
    options = dict(request.query_params)
    if "\0" in str(request.url.query) or "%00" in str(request.url.query):
        raise NotFound("no figure has a NUL in its options")
    _check_others(store, asker, options.get("studies", ""))
    # What other studies came to is not counted by this one's changes.
    others = [store.feed.stamp(other.strip()) for other in options.get("studies", "").split(",") if other.strip()]
    depends = (study.id, study.changes, *[(other.id, other.changes) for other in others if other is not None])
    return tagged(
        request, depends, lambda: _view(request, store, study.id).figure(name, **options).to_json(), keep=True
    )


@router.get("/points", response_model=PointsAnswer, responses=_UNCHANGED)
def get_points(
    request: Request,
    store: Stored,
    study: Visible,
    since: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="The count of changes that was seen.")] = None,
) -> Response:
    """All trials by columns, or those that changed after `since`."""

    def make() -> Any:
        points = _dashboard("points").points
        if since is not None:
            record = store.study(study.id)
            changed = [] if since >= record.changes else store.trials(study.id, changed_since=since)
            return points(record, _dashboard("columns").Trials.of(changed))
        view = _view(request, store, study.id).refresh()
        return points(view.study, view.trials)

    return tagged(request, (study.id, study.changes), make, keep=since is None)


@router.get("/report", response_class=Response, responses=_HTML)
def get_report(request: Request, store: Stored, study: Visible) -> Response:
    """The study as one HTML file, as `autoq report` writes it. A study without a complete trial has none: 409."""

    def make() -> str:
        text: str = _dashboard("report").html(store, study.id)
        return text

    response = tagged(request, (study.id, study.changes), make, "text/html; charset=utf-8")
    # Its scripts stand in it, and run where it is saved; they are not let near this server's pages.
    response.headers["Content-Disposition"] = f'attachment; filename="{study.name}.html"'
    response.headers["Content-Security-Policy"] = "sandbox; default-src 'none'"
    return response


@router.get("/overview", response_model=OverviewAnswer, responses=_UNCHANGED)
def get_overview(request: Request, store: Stored, study: Visible) -> Response:
    """What a list shows of a study: a sentence about its best point, and how its hypervolume grew, as an SVG path."""

    def make() -> Any:
        return _dashboard("overview").overview(_view(request, store, study.id).refresh())

    return tagged(request, (study.id, study.changes), make, keep=True)
