"""The application: one store, and the routes of every file in `routes/`.

A file of that folder is a noun of the API or the pages; its `router` is included as it stands. What holds for all of
them is put around them here: who may ask (`auth`), what may be sent (`headers`, `limits`), how errors look
(`errors`), and that a study in the address is one that the asker may see (`context.studied`). So a new route is
closed and bounded by itself.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from fastapi import Depends, FastAPI

import autoq
from autoq.service import answers, errors, routes
from autoq.service.auth import PUBLIC, Authenticate, Guard
from autoq.service.compression import Gzip
from autoq.service.context import studied
from autoq.service.events import Hub
from autoq.service.headers import Believed, Secured
from autoq.service.heavy import Backroom, Scheduler
from autoq.service.limits import Bodies, Rate
from autoq.service.metrics import Measured, Metrics
from autoq.service.routes import pages
from autoq.service.schemas import ErrorAnswer
from autoq.service.settings import Settings
from autoq.service.submitting import Submissions
from autoq.service.views import Views
from autoq.store import Store

_ERRORS = {
    400: "The request cannot be read",
    401: "No valid token",
    403: "The token's role does not allow it, or another site's page has sent it",
    404: "There is no such thing, or it is another user's",
    408: "The body did not come in time",
    409: "It does not go with what is stored",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "A field is not valid; the message names it",
    429: "A limit is reached; Retry-After says when to try again",
    503: "The database, or what answers what needs a model, cannot be used at the moment",
    504: "What needs a model took more time or memory than it may",
}


def create_app(
    store: Store,
    settings: Settings | None = None,
    backroom: Backroom | None = None,
    scheduler: Scheduler | None = None,
) -> FastAPI:
    """The application on an open store, which stays the caller's to close.

    `backroom` answers what needs a model and `scheduler` runs what is queued; both are the caller's to start and stop.
    Without a backroom, submissions are refused.
    """
    settings = settings or Settings()
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": text} for status, text in _ERRORS.items()
    }
    app = FastAPI(
        title="AutoQ",
        version=autoq.__version__,
        summary="Mixed-precision quantization search",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        root_path=settings.root_path,
        responses=responses,
        dependencies=[Depends(studied)],
        generate_unique_id_function=lambda route: route.name,
        separate_input_output_schemas=False,
    )
    metrics = Metrics(store, scheduler)
    app.state.store, app.state.settings, app.state.metrics = store, settings, metrics
    app.state.kept = answers.Kept()
    app.state.hub = Hub(store, metrics, settings.limits.event_streams, settings.limits.event_streams_each)
    app.state.views = Views(store)
    app.state.submissions = Submissions(store, settings)
    app.state.backroom, app.state.scheduler = backroom, scheduler
    app.state.error_page = pages.error_page
    errors.install(app)
    for found in sorted(pkgutil.iter_modules(routes.__path__), key=lambda module: module.name):
        app.include_router(importlib.import_module(f"autoq.service.routes.{found.name}").router)
    app.openapi = functools.partial(_described, app)  # type: ignore[method-assign]
    # The last one added is the first to see a request.
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(Guard)
    app.add_middleware(Rate, settings=settings)
    app.add_middleware(Authenticate, settings=settings, store=store)
    app.add_middleware(Believed, settings=settings)
    app.add_middleware(Gzip)
    app.add_middleware(errors.Bugs)
    app.add_middleware(Secured, settings=settings)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with how one says who one is."""
    if app.openapi_schema is None:
        told = FastAPI.openapi(app)
        told["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"bearer": []}]
        for path in PUBLIC & told["paths"].keys():
            for operation in told["paths"][path].values():
                operation["security"] = []
    return app.openapi_schema or {}
