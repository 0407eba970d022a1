"""The API against its own description: what is promised is given, and nothing breaks the server."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import schemathesis
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from autoq.service import schemas
from autoq.service.app import create_app
from autoq.service.settings import Limits, Settings
from autoq.store import Store
from autoq.store.models import tokens

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def described(template, tmp_path_factory, desk, runs):
    """The server's description, and an admin's header; the database takes all that is tried."""
    path = shutil.copy(template, tmp_path_factory.mktemp("described") / "autoq.db")
    with Store.open(str(path)) as store:
        limits = Limits(requests_per_second=1e6, burst=10**6, waiting_studies=None, waiting_exports=None)
        app = create_app(store, Settings(limits=limits, hosts=("*",)), desk, runs)
        secret, _ = store.accounts.create("schemathesis", "ada", "admin")
        told = app.openapi() | {"security": []}  # whoever asks here always says who it is
        for _ in range(30):  # to be revoked by chance, rather than that of who asks
            store.accounts.create("spare", "bob", "viewer")
        with store._database.writing() as connection:  # no number that is tried by chance
            connection.execute(sa.update(tokens).where(tokens.c.name == "schemathesis").values(id=2**31 - 2))
        refusals = [400, 403, 404, 408, 409, 413, 415, 422]
        checks = {"checks": {"negative_data_rejection": {"expected-statuses": refusals}}}
        config = schemathesis.config.SchemathesisConfig.from_dict(checks)
        schema = schemathesis.openapi.from_dict(told, config=config)
        schema.app = app
        yield schema, {"Authorization": f"Bearer {secret}"}


def test_every_route_keeps_what_it_promises(described):
    schema, headers = described
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/events"):
            continue  # streams never end; see below
        tried += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(cases)
            def keeps(case):
                case.call_and_validate(checks=CHECKS, headers=headers)

            # About some addresses nothing can be wrong.
            with contextlib.suppress(Unsatisfiable):
                keeps()
    assert tried > 25


@pytest.mark.parametrize("path", ["/api/v1/events", "/api/v1/studies/{study}/events"])
def test_streams_keep_what_they_promise_of_their_beginning(described, path):
    """The stream of a server that is closing ends by itself, so its answers can be judged as all others."""
    schema, headers = described
    schema.app.state.hub.close()
    operation = schema[path]["GET"]
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(operation.as_strategy(generation_mode=mode))
        def keeps(case):
            case.call_and_validate(checks=CHECKS, headers=headers)

        keeps()


def test_the_description_is_complete(open_server, conftest_routes):
    told = open_server.client().get("/api/v1/openapi.json").json()
    there = {
        (m.lower(), p) for m, p in conftest_routes(open_server.app) if p.startswith("/api/") and "openapi" not in p
    }
    promised = {(method, path) for path, methods in told["paths"].items() for method in methods}
    assert there <= promised
    names = [operation["operationId"] for methods in told["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            answers = operation["responses"]
            for status in ("400", "401", "403", "404", "409", "413", "415", "422", "429"):
                content = answers[status]["content"]["application/json"]["schema"]
                assert content == {"$ref": "#/components/schemas/ErrorAnswer"}, (path, status)
            assert "HTTPValidationError" not in str(operation)
            good = next(answers[status] for status in ("200", "201") if status in answers)
            schemes = [kind["schema"] for kind in good["content"].values()]
            assert all(scheme for scheme in schemes), f"{method} {path} promises nothing"
            assert operation["summary"]
    shapes = told["components"]["schemas"]
    assert all(shapes[name].get("additionalProperties") is False for name in shapes), "nothing else is in them"
    assert set(shapes["TrialShape"]["required"]) == set(schemas.TrialShape.model_fields)
    assert told["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
