"""Values per token as they are stored: how near, how small, and from the schema before."""

import dataclasses
import zlib

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autoq import store as package
from autoq.assignment import Assignment
from autoq.errors import StoreError
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.models import SCHEMA
from autoq.store.packing import pack_values, unpack_values

ANY = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.floats(width=32))


@given(ANY)
def test_values_come_back_within_their_error(values):
    found = unpack_values(**pack_values(values))
    assert (found.dtype, found.shape) == (np.float32, values.shape)
    assert np.array_equal(np.isnan(found), np.isnan(values))
    known = values[np.isfinite(values)].astype(np.float64)
    # The smallest normal number bounds the error of what is smaller still, the largest that of what would be infinite.
    assert np.all(np.abs(found[np.isfinite(values)] - known) <= 2.0**-12 * np.maximum(np.abs(known), 2.0**-126))
    assert np.array_equal(found[np.isinf(values)], values[np.isinf(values)])
    assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(values[~np.isnan(values)]))
    again = unpack_values(**pack_values(found))
    assert np.array_equal(again, found, equal_nan=True), "what was kept is kept exactly"


def test_what_is_exact():
    exact = np.array([[0.0, -0.0, 0.5, 1.0, -3.0, 4095.0, 4096.0, 2.0**100, np.inf, -np.inf]], dtype=np.float32)
    assert np.array_equal(unpack_values(**pack_values(exact)), exact)
    # Two apart at this size: of two neighbours that are as near the even one, and never beyond the largest float.
    found = unpack_values(**pack_values(np.array([[4097.0, 4099.0, 3.4028235e38]], dtype=np.float32)))
    assert found.tolist() == [[4096.0, 4100.0, 2.0**128 - 2.0**116]]


def test_values_of_a_trial_take_half_of_what_they_took():
    draw = np.random.default_rng(0)
    values = draw.lognormal(0.0, 1.5, (4, 512)).astype(np.float32)
    size = len(pack_values(values)["body"])
    assert size < 3800 < 0.51 * len(zlib.compress(values.tobytes()))
    values[1:] = np.nan
    assert len(pack_values(values)["body"]) < 0.3 * size, "what was not evaluated takes no room"


def test_a_body_of_another_length_is_refused():
    body = pack_values(np.ones((2, 3), np.float32))["body"]
    with pytest.raises(ValueError, match=r"^15 bytes are not 2 × 4 values$"):
        unpack_values(2, 4, body)


def test_values_of_the_schema_before_are_packed_and_back(tmp_path):
    url = str(tmp_path / "autoq.db")
    values = np.random.default_rng(0).lognormal(size=(3, 5)).astype(np.float32)
    values[2, 1:] = np.nan
    with Store.open(url) as store:
        study = store.create_study(build_spec({"model": {"id": "tiny"}}), [("kl", "nats", "minimize")])
        for number in range(3):
            chosen = Assignment({"up": parse_scheme(f"rtn-int{number + 2}-g64")})
            trial = store.start_trial(study.id, number, chosen, "sampler")
            loss = Measurement("kl", 1.0, "nats", "measured", "search", per_token=values * (number + 1))
            assert store.finish_trial(trial.id, 1, [loss, dataclasses.replace(loss, part="report")], {}, 1.0, "w")
        _to(store, "0008", command.downgrade)
        with store._database.reading() as connection:
            bodies = connection.execute(sa.text("SELECT body FROM token_values WHERE part = 'report'")).scalars().all()
        assert len(bodies) == 3
        before = [np.frombuffer(zlib.decompress(body), "<f4").reshape(3, 5) for body in bodies]
    with Store.open(url) as store:
        assert store._database.schema() == SCHEMA
        for number in range(3):
            found = store.token_values(study.id, number, "kl", "report")
            assert np.array_equal(found, before[number], equal_nan=True)
            assert np.allclose(found, values * (number + 1), rtol=2.0**-12, atol=0, equal_nan=True)
        with store._database.writing() as connection:
            connection.execute(sa.text("UPDATE token_values SET tokens = 4"))
        with pytest.raises(
            StoreError, match=r"is damaged: a value cannot be read: 38 bytes are not 3 × 4 values; go back"
        ):
            store.token_values(study.id, 0, "kl", "search")


def _to(store, revision, way):
    config = Config()
    config.set_main_option("script_location", f"{package.__path__[0]}/migrations")
    config.set_main_option("path_separator", "os")
    with store._database.writing() as connection:
        config.attributes["connection"] = connection
        way(config, revision)
