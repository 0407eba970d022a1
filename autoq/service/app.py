"""The application: one store, and the routes of every file in `routes/`.

A file of that folder is a noun of the API or the pages; its `router` is included as it stands.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastapi import FastAPI

import autoq
from autoq.service import routes
from autoq.store import Store


def create_app(store: Store) -> FastAPI:
    """The application on an open store, which stays the caller's to close."""
    app = FastAPI(title="AutoQ", version=autoq.__version__, docs_url=None, redoc_url=None)
    app.state.store = store
    for found in sorted(pkgutil.iter_modules(routes.__path__), key=lambda module: module.name):
        app.include_router(importlib.import_module(f"autoq.service.routes.{found.name}").router)
    return app
