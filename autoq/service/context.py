"""What every route gets: the store, and who asks."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from autoq.store import Store


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


Stored = Annotated[Store, Depends(_store)]
