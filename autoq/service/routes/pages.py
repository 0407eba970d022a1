"""The dashboard's pages: templates with a study's facts in them; modules in the browser fetch and draw the rest."""

from __future__ import annotations

import functools
import importlib
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from autoq.errors import NotFound
from autoq.service import assets, jobs
from autoq.service.context import Stored, Visible

router = APIRouter(include_in_schema=False)

_TITLES = {403: "Not allowed", 404: "Not found", 429: "Too much at once", 503: "Not now"}


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autoq.dashboards", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = assets.address
    return environment


def _page(request: Request, template: str, here: str, status: int = 200, **values: Any) -> HTMLResponse:
    root = request.scope.get("root_path", "")
    html = _templates().get_template(template).render(root=root, here=here, **values)
    # What is shown changes with every trial; the files that it names never do.
    return HTMLResponse(html, status, headers={"Cache-Control": "no-cache"})


def error_page(request: Request, status: int, message: str) -> HTMLResponse:
    """What a browser is shown instead of a page."""
    return _page(
        request, "error.html", "", status=status, title=_TITLES.get(status, "This did not work"), message=message
    )


@functools.cache
def _plot_templates() -> dict[str, Any]:
    palette = importlib.import_module("autoq.dashboards.palette")
    return {theme: palette.template(theme) for theme in palette.THEMES}


@router.get("/")
def studies_page(request: Request) -> HTMLResponse:
    """All studies."""
    return _page(request, "studies.html", "/")


@router.get("/new")
def new_page(request: Request) -> HTMLResponse:
    """Submit a study."""
    return _page(request, "new.html", "/new")


@router.get("/compare")
def compare_page(request: Request) -> HTMLResponse:
    """Several studies on one frontier: `?studies=a,b`."""
    return _page(request, "compare.html", "/compare", templates=_plot_templates())


@router.get("/login")
def login_page(request: Request) -> HTMLResponse:
    """Sign in with a token."""
    return _page(request, "login.html", "/login")


@router.get("/studies/{study}")
def study_page(request: Request, store: Stored, study: Visible) -> HTMLResponse:
    """One study, its frontier first."""
    return _page(
        request, "study.html", "", templates=_plot_templates(), data={"study": store.study(study.id).to_json()}
    )


@router.get("/studies/{study}/trials/{number}")
def trial_page(
    request: Request, store: Stored, study: Visible, number: Annotated[int, Path(ge=0, le=2**31 - 1)]
) -> HTMLResponse:
    """One trial, whole."""
    trial = store.trial(study.id, number)
    assert trial.assignment is not None
    facts = trial.to_json() | {
        "assignment": trial.assignment.to_dict(),
        "attempt": trial.attempt,
        "sampler": _finite(trial.sampler_attrs),
        "derived": store.feed.derived(study.id, number),
        "improvable": jobs.improvable(store, study.id, number),
        "job": jobs.of_trial(store, study.id),
    }
    data = {"study": store.study(study.id).to_json(), "trial": facts}
    return _page(request, "trial.html", "", templates=_plot_templates(), data=data)


@router.get("/studies/{study}/diff")
def diff_page(request: Request, store: Stored, study: Visible) -> HTMLResponse:
    """Two trials side by side: `?a=31&b=uniform-int4`."""
    return _page(request, "diff.html", "", templates=_plot_templates(), data={"study": store.study(study.id).to_json()})


@router.get("/static/{digest}/{name}")
def static_file(request: Request, digest: str, name: str) -> Response:
    """A static file, compressed where the browser takes it."""
    try:
        found = assets.asset(digest, name)
    except NotFound as problem:
        return PlainTextResponse(str(problem), 404, headers={"Cache-Control": "no-store"})
    headers = {"Cache-Control": assets.FOREVER, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.compressed, headers=headers | {"Content-Encoding": "gzip"}, media_type=found.media_type)
    return Response(found.body, headers=headers, media_type=found.media_type)


def _finite(attributes: Any) -> Any:
    """Plain JSON of what a sampler left: a NaN there becomes null."""
    if isinstance(attributes, dict):
        return {key: _finite(value) for key, value in attributes.items()}
    if isinstance(attributes, list | tuple):
        return [_finite(value) for value in attributes]
    whole = not isinstance(attributes, float) or attributes - attributes == 0
    return attributes if whole else None
