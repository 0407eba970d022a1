"""Studies by request: submit, cancel, resume, refine, check, and what a user's spec may name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from autoq.errors import GaveUp, SpecError, Unavailable
from autoq.service import schemas
from autoq.service.auth import OPEN, Asker
from autoq.service.settings import Sources
from autoq.service.sources import check_sources
from autoq.spec import build_spec

SPEC = {"model": {"id": "demo:smollm2"}, "name": "sent"}
YAML = "model: {id: 'demo:smollm2'}\nname: sent\n"


@pytest.fixture
def client(open_server):
    return open_server.client()


def submit(client, key=None, **body):
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post("/api/v1/studies", json={"spec": SPEC} | body, headers=headers)


def test_a_submission_is_a_queued_study_of_its_user(server):
    answer = submit(server.client("ada-submitter"))
    assert answer.status_code == 201
    told = schemas.StudyAnswer.model_validate(answer.json(), strict=True)
    assert (told.study, told.state, told.owner, told.priority) == ("sent", "queued", "ada", 0)
    assert server.store.study("sent").owner == "ada"
    assert server.store.table(server.store.study("sent").id, "layers") == {}
    assert server.app.state.scheduler.woken == 1
    as_yaml = server.client("ada-submitter").post("/api/v1/studies", json={"yaml": YAML})
    assert (as_yaml.status_code, as_yaml.json()["study"]) == (201, "sent-2")
    assert as_yaml.json()["spec"] == answer.json()["spec"]


def test_one_key_makes_one_study_however_often_it_is_sent(server):
    client = server.client("ada-submitter")
    first = submit(client, "k1")
    asked = server.app.state.backroom.asked
    again = submit(client, "k1")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert server.app.state.backroom.asked == asked, "what is there need not be checked again"
    other = submit(client, "k1", spec={**SPEC, "name": "other"})
    assert other.status_code == 409
    assert "'k1' was used for another study" in other.json()["error"]["message"]
    assert submit(client, "k1", priority=-1).status_code == 409
    assert submit(server.client("bob-submitter"), "k1").status_code == 201, "a key is its user's own"
    assert submit(client, "k2").status_code == 201


def test_many_at_once_under_few_keys(open_server):
    with open_server.client() as client, ThreadPoolExecutor(8) as pool:  # one event loop, as a server has
        answers = list(pool.map(lambda number: submit(client, f"key-{number % 5}"), range(40)))
    assert sorted(answer.status_code for answer in answers) == [200] * 35 + [201] * 5
    assert len({answer.json()["id"] for answer in answers}) == 5


def test_what_the_backroom_refuses_is_no_study(open_server, client):
    before = open_server.store.feed.versions()
    answer = submit(client, "k", spec={"model": {"id": "other/model"}})
    assert answer.status_code == 422
    assert answer.json()["error"] == {"message": "model.id: no model 'other/model'", "field": "model.id"}
    assert open_server.store.feed.versions() == before
    assert submit(client, "k").status_code == 201, "the key is still free"


@pytest.mark.parametrize(("problem", "status"), [(GaveUp, 504), (Unavailable, 503)])
def test_what_the_backroom_does_not_answer_in_time_is_no_fault_of_the_request(open_server, client, problem, status):
    async def prepare(spec):
        raise problem("to check the spec took longer than 180 s, and was given up")

    open_server.app.state.backroom.prepare = prepare
    for path, body in (("studies", {}), ("specs:check", {"deep": True})):
        answer = client.post(f"/api/v1/{path}", json={"spec": SPEC} | body)
        assert answer.status_code == status
        assert answer.json()["error"] == {"message": "to check the spec took longer than 180 s, and was given up"}
        assert int(answer.headers["retry-after"]) > 0
    assert open_server.store.queue.queued() == []


def test_a_server_without_a_backroom_takes_none(open_server, client):
    open_server.app.state.backroom = None
    answer = submit(client)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "this server only shows what is stored; it takes no studies"


def test_only_an_admin_goes_before_others(server):
    assert submit(server.client("ada-submitter"), priority=1).status_code == 403
    assert submit(server.client("ada-submitter"), priority=-5).json()["priority"] == -5
    assert submit(server.client("ada-admin"), priority=7).json()["priority"] == 7


def test_a_user_has_so_many_waiting_studies(open_server, store):
    import dataclasses

    limits = dataclasses.replace(open_server.app.state.settings.limits, waiting_studies=2)
    settings = dataclasses.replace(open_server.app.state.settings, limits=limits)
    open_server.app.state.settings = open_server.app.state.submissions.settings = settings
    client = open_server.client()
    assert [submit(client).status_code for _ in range(3)] == [201, 201, 429]
    refused = submit(client)
    assert "2 are allowed at a time" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0


def test_a_study_is_cancelled_and_resumed(open_server, client):
    study = submit(client).json()["study"]
    cancelled = client.post(f"/api/v1/studies/{study}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    again = client.post(f"/api/v1/studies/{study}/cancel")
    assert (again.status_code, again.json()["error"]["message"]) == (
        409,
        "study 'sent' is cancelled and cannot be cancelled",
    )
    assert client.post(f"/api/v1/studies/{study}/resume").json()["state"] == "queued"
    assert client.post(f"/api/v1/studies/{study}/resume").status_code == 409
    client.post(f"/api/v1/studies/{study}/cancel")
    more = client.post(f"/api/v1/studies/{study}/resume", json={"trials": 300})
    assert more.json()["spec"]["budget"]["trials"] == 300
    finished = client.post("/api/v1/studies/mine/resume")
    assert (finished.status_code, "more trials" in finished.json()["error"]["message"]) == (409, True)
    fewer = client.post("/api/v1/studies/mine/resume", json={"trials": 3})
    assert fewer.status_code == 422


def test_a_study_is_removed_by_its_owner(server):
    ada, bob = server.client("ada-submitter"), server.client("bob-submitter")
    study = submit(ada).json()["study"]
    waits = ada.delete(f"/api/v1/studies/{study}")
    assert (waits.status_code, waits.json()["error"]["message"]) == (409, "study 'sent' is queued; cancel it first")
    ada.post(f"/api/v1/studies/{study}/cancel")
    assert bob.delete(f"/api/v1/studies/{study}").status_code == 404
    assert server.client("ada-viewer").delete(f"/api/v1/studies/{study}").status_code == 403
    listed = ada.get("/api/v1/studies")
    told = ada.delete(f"/api/v1/studies/{study}")
    assert told.status_code == 200
    assert {key: told.json()[key] for key in ("study", "owner", "user", "trials")} == {
        "study": "sent", "owner": "ada", "user": "ada", "trials": 0,
    }  # fmt: skip
    assert ada.delete(f"/api/v1/studies/{study}").status_code == 404
    again = ada.get("/api/v1/studies", headers={"If-None-Match": listed.headers["etag"]})
    assert [each["study"] for each in again.json()["studies"]] == ["mine"]


def test_measure_it_is_queued(open_server, client):
    answer = client.post(
        "/api/v1/studies/mine/refine", json={"max": {"size_bytes": "90MB"}, "best": "kl_nats_per_token", "n": 2}
    )
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    job = open_server.store.table(open_server.store.study("mine").id, "job")
    assert (job["kind"], job["n"], job["best"]) == ("refine", 2, "kl_nats_per_token")
    for body, fragment in (
        ({}, "limit"),
        ({"max": {"nope": 3}}, "no measured objective 'nope'"),
        ({"max": {"size_bytes": "90MB"}, "best": "nope"}, "no objective of this study 'nope'"),
        ({"max": {"size_bytes": 1}, "min": {"size_bytes": 2}}, "exclude each other"),
    ):
        refused = client.post("/api/v1/studies/theirs/refine", json=body)
        assert refused.status_code == 422
        assert fragment in refused.json()["error"]["message"]


def test_an_export_is_queued_once(open_server, client):
    body = {"trial": "uniform-int4", "target": "llama-cpp"}
    first, again = (client.post("/api/v1/studies/mine/exports", json=body) for _ in range(2))
    assert first.status_code == 201
    assert first.json() == again.json()
    assert (first.json()["trial"], first.json()["state"]) == (2, "queued")
    wrong = client.post("/api/v1/studies/mine/exports", json={"trial": 3, "target": "lama-cpp"})
    assert "did you mean 'llama-cpp'?" in wrong.json()["error"]["message"]
    assert client.post("/api/v1/studies/mine/exports", json={"trial": 8}).status_code == 422, "it failed"
    assert client.post("/api/v1/studies/mine/exports", json={"trial": 7}).json()["trial"] == 3, "a duplicate's original"


@pytest.mark.parametrize(
    ("body", "ok", "field", "fragment"),
    [
        ({"spec": SPEC}, True, None, None),
        ({"yaml": YAML}, True, None, None),
        ({"spec": SPEC, "deep": True}, True, None, None),
        ({"yaml": "model: {id: x}\nbudget: {trials: 0}"}, False, "budget.trials", "must be at least 1 (got 0)"),
        ({"spec": {"model": {"id": "x"}, "objectivs": []}}, False, "objectivs", "did you mean 'objectives'?"),
        ({"yaml": "model: [", }, False, None, "the spec is not valid YAML"),
        ({"spec": {"model": {"id": "x/y"}}, "deep": True}, False, "model.id", "no model 'x/y'"),
        ({}, False, "spec", "give either spec"),
    ],
)  # fmt: skip
def test_a_spec_is_checked_in_the_servers_own_words(open_server, client, body, ok, field, fragment):
    before = open_server.store.feed.versions()
    answer = client.post("/api/v1/specs:check", json=body)
    assert answer.status_code == 200
    told = schemas.CheckAnswer.model_validate(answer.json(), strict=True)
    assert (told.ok, told.field) == (ok, field), told
    assert told.message is None if ok else fragment in told.message
    assert (told.facts == {"layers": 210}) == (ok and body.get("deep", False))
    assert open_server.store.feed.versions() == before
    if not ok and body:
        refused = client.post("/api/v1/studies", json={k: v for k, v in body.items() if k != "deep"})
        assert refused.json()["error"]["message"] == told.message


ADA = Asker("ada", "submitter", 1)


def spec_of(**fields):
    return build_spec({"model": {"id": "demo:smollm2"}, **fields})


@pytest.fixture
def roots(tmp_path):
    """A folder of models and one of texts, with what an intruder would like beside them."""
    for name in ("models/tiny", "data", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "text.txt").write_text("x")
    (tmp_path / "secret" / "key.txt").write_text("x")
    (tmp_path / "models" / "sly").symlink_to(tmp_path / "secret")
    return tmp_path


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": {"id": "/etc"}}, "model.id"),
        ({"model": {"id": "~/model"}}, "model.id"),
        ({"model": {"id": "../model"}}, "model.id"),
        ({"model": {"id": "./model"}}, "model.id"),
        ({"model": {"id": "file:///etc"}}, "model.id"),
        ({"model": {"id": "ROOT/models/sly"}}, "model.id"),
        ({"model": {"id": "ROOT/models/../secret"}}, "model.id"),
        ({"model": {"id": "ROOT/models-and-more"}}, "model.id"),
        ({"model": {"id": "tests"}}, "model.id"),
        ({"data": {"source": "/etc/passwd"}}, "data.source"),
        ({"data": {"source": "ROOT/secret/key.txt"}}, "data.source"),
        ({"data": {"source": "ROOT/models/tiny"}}, "data.source"),
        ({"data": {"source": "pyproject.toml"}}, "data.source"),
        ({"tasks": {"t": {"source": "/etc/passwd"}}}, "tasks.t.source"),
        ({"target": {"name": "described", "device": "/etc/passwd"}}, "target.device"),
        ({"target": {"name": "described", "device": "x.yaml"}}, "target.device"),
        ({"recipes": ["quantize_config.json"]}, "recipes"),
        ({"workers": {"executor": "ray", "address": "10.0.0.1:6379"}}, "workers.address"),
        ({"workers": {"executor": "ray"}}, "workers.executor"),
        ({"bank": {"disk": "10TB"}}, "bank"),
        ({"bank": {"memory": "1MB"}}, "bank"),
    ],
)
def test_a_users_spec_reads_nothing_of_the_servers(roots, fields, field, hub, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(Path(__file__).parents[2])
    text = {"ROOT": str(roots)}

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.replace("ROOT", text["ROOT"]) if isinstance(value, str) else value

    spec = spec_of(**filled(fields))
    sources = Sources((roots / "models",), (roots / "data",), hub)
    with pytest.raises(SpecError, match=f"^{field}: ") as refused:
        check_sources(spec, ADA, sources)
    assert str(roots / "models") not in str(refused.value).partition("(got")[0]
    check_sources(spec, OPEN, sources)
    check_sources(spec, Asker("ada", "admin", 1), sources)


def test_what_a_user_may_name(roots):
    sources = Sources((roots / "models",), (roots / "data",), False, 4)
    for fields in (
        {},
        {"model": {"id": f"{roots}/models/tiny"}},
        {"data": {"source": f"{roots}/data/text.txt"}},
        {"data": {"source": f"{roots}/data"}},
        {"target": {"name": "described", "device": "edge-npu"}},
        {"workers": {"executor": "ray", "count": 4}},
    ):
        check_sources(spec_of(**fields), ADA, sources)
    with pytest.raises(SpecError, match=r"^workers.count: must be at most 4"):
        check_sources(spec_of(workers={"executor": "ray", "count": 5}), ADA, sources)
    cluster = {"executor": "ray", "address": "ray://head:10001"}
    served = Sources(cluster="ray://head:10001", cluster_workers=8)
    check_sources(spec_of(workers={**cluster, "count": 8}), ADA, served)
    for workers, line in (
        ({**cluster, "count": 9}, r"^workers.count: must be at most 8 on this cluster"),
        (
            {**cluster, "address": "ray://other:1"},
            r"^workers.address: only an admin .*, but for ray://head:10001 \(got",
        ),
        ({"executor": "ray"}, r"^workers.executor: must be local .*, or ray with address ray://head:10001"),
    ):
        with pytest.raises(SpecError, match=line):
            check_sources(spec_of(workers=workers), ADA, served)
    hub = Sources(hub=True)
    for fields in ({"model": {"id": "HuggingFaceTB/SmolLM2-135M"}}, {"data": {"source": "Salesforce/wikitext"}}):
        check_sources(spec_of(**fields), ADA, hub)
        with pytest.raises(SpecError):
            check_sources(spec_of(**fields), ADA, Sources())


def test_a_refusal_says_the_same_whether_a_file_is_there(roots):
    said = []
    for name in ("secret", "nothing"):
        with pytest.raises(SpecError) as refused:
            check_sources(spec_of(model={"id": f"{roots}/{name}"}), ADA, Sources((roots / "models",)))
        said.append(str(refused.value).partition(" (got")[0])
    assert said[0] == said[1]


def test_the_rule_holds_at_every_door(server):
    body = {"spec": {"model": {"id": "/etc"}}}
    client = server.client("ada-submitter")
    assert client.post("/api/v1/studies", json=body).json()["error"]["field"] == "model.id"
    told = client.post("/api/v1/specs:check", json=body | {"deep": True}).json()
    assert (told["ok"], told["field"]) == (False, "model.id")
    assert server.app.state.backroom.asked == 0
