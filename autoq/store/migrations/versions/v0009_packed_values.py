"""Values per token in 14.5 bits instead of 29.5: see `autoq.store.packing`."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import sqlalchemy as sa
from alembic import op

from autoq.store.packing import pack_values, unpack_values

revision = "0009"
down_revision = "0008"

_KEY = ("trial_id", "objective", "part")
_VALUES = sa.table(
    "token_values",
    *(sa.column("trial_id", sa.Integer), sa.column("objective", sa.String), sa.column("part", sa.String)),
    *(sa.column("windows", sa.Integer), sa.column("tokens", sa.Integer), sa.column("body", sa.LargeBinary)),
)


def upgrade() -> None:
    _change(lambda windows, tokens, body: pack_values(_floats(body).reshape(windows, tokens))["body"])


def downgrade() -> None:
    _change(lambda *row: zlib.compress(unpack_values(*row).astype("<f4").tobytes()))


def _floats(body: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(body), "<f4")


def _change(change: Callable[[int, int, bytes], bytes]) -> None:
    """Every body, one trial's at a time: together they may be larger than memory."""
    connection, v = op.get_bind(), _VALUES.c
    update = sa.update(_VALUES).where(*(v[name] == sa.bindparam(f"of_{name}") for name in _KEY))
    update = update.values(body=sa.bindparam("changed"))
    for trial_id in connection.execute(sa.select(v.trial_id).distinct()).scalars().all():
        for row in connection.execute(sa.select(_VALUES).where(v.trial_id == trial_id)).all():
            key = {f"of_{name}": getattr(row, name) for name in _KEY}
            changed = change(row.windows, row.tokens, row.body)
            connection.execute(update, {**key, "changed": changed})
