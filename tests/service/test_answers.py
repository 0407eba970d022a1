"""What is answered: the shapes of `to_json`, tags, pages, CSV, metrics."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from autoq.cli import app as cli
from autoq.service import schemas
from autoq.service.routes.queue import QueueAnswer

STUDY = "/api/v1/studies/mine"
SHAPES = {
    "/api/v1/studies": schemas.StudyListAnswer,
    STUDY: schemas.StudyStandingAnswer,
    f"{STUDY}/frontier": schemas.FrontierAnswer,
    f"{STUDY}/frontier?assignments=false&max=size_bytes=100MB": schemas.FrontierAnswer,
    f"{STUDY}/trials": schemas.TrialsAnswer,
    f"{STUDY}/trials?assignments=true&state=failed&state=duplicate": schemas.TrialsAnswer,
    f"{STUDY}/baselines": schemas.BaselinesAnswer,
    f"{STUDY}/pick?max=size_bytes=100MB&best=kl_nats_per_token": schemas.FrontierTrialShape,
    f"{STUDY}/offer?max=size_bytes=100MB": schemas.OfferAnswer,
    f"{STUDY}/sensitivity": schemas.SensitivityAnswer,
    f"{STUDY}/layers": schemas.LayersAnswer,
    f"{STUDY}/diff?a=1&b=uniform-int4": schemas.DiffAnswer,
    f"{STUDY}/trials/3": schemas.TrialShape,
    f"{STUDY}/trials/8": schemas.TrialShape,
    f"{STUDY}/trials/3/values?objective=kl_nats_per_token": schemas.ValuesAnswer,
    f"{STUDY}/trials/3/remark": schemas.RemarkShape,
    f"{STUDY}/trials/4/remark": schemas.RemarkShape,
    f"{STUDY}/remarks": schemas.RemarksAnswer,
    f"{STUDY}/exports": schemas.ExportsAnswer,
    "/api/v1/exports": schemas.ExportsAnswer,
    "/api/v1/exports/1": schemas.ExportShape,
    "/api/v1/workers": schemas.WorkersAnswer,
    "/api/v1/queue": QueueAnswer,
    "/api/v1/tokens": schemas.TokensAnswer,
    "/api/v1/session": schemas.SessionAnswer,
    "/api/v1/methods": schemas.MethodsAnswer,
    "/api/v1/targets": schemas.TargetsAnswer,
    "/api/v1/objectives": schemas.ObjectivesAnswer,
    "/api/v1/samplers": schemas.SamplersAnswer,
    "/healthz": schemas.HealthAnswer,
    "/readyz": schemas.ReadyAnswer,
}


@pytest.fixture
def client(open_server):
    return open_server.client()


@pytest.mark.parametrize("path", SHAPES)
def test_answers_have_the_shape_that_openapi_promises(client, path):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    parsed = SHAPES[path].model_validate(answer.json(), strict=True)
    assert parsed.model_dump(mode="json") == answer.json(), "nothing is left out, nothing is added"


def test_errors_have_one_shape(client):
    for method, path, body in (
        ("GET", "/api/v1/studies/none", None),
        ("GET", "/nothing", None),
        ("DELETE", "/api/v1/studies", None),
        ("GET", "/api/v1/studies?limit=x", None),
        ("GET", "/api/v1/studies?lmit=3", None),
        ("GET", f"{STUDY}/trials/99", None),
        ("GET", f"{STUDY}/pick?max=size_bytes=1", None),
        ("POST", "/api/v1/studies", {"spec": {"model": {}}}),
    ):
        answer = client.request(method, path, json=body)
        assert 400 <= answer.status_code < 500
        schemas.ErrorAnswer.model_validate(answer.json(), strict=True)


@pytest.mark.parametrize(
    ("path", "status", "message", "field"),
    [
        ("/api/v1/studies?lmit=3", 422, "lmit: no such parameter; choose from cursor, limit,", "lmit"),
        ("/api/v1/studies?limit=0", 422, "limit: must be at least 1 (got '0')", "limit"),
        ("/api/v1/studies?state=done", 422, "state.0: 'done' is not one of", "state.0"),
        ("/api/v1/studies?cursor=x", 422, "cursor: must be `next`", "cursor"),
        ("/api/v1/studies?search=%00", 422, "search: must have no NUL", "search"),
        (f"{STUDY}/trials?state=failedd", 422, "state.0: 'failedd' is not one of", "state.0"),
        (f"{STUDY}/trials/99", 404, "study 'mine' has no trial 99; its trials are 0 to 8", None),
        (f"{STUDY}/trials/x", 422, "number: ", "number"),
        (f"{STUDY}/trials/99999999999", 422, "number: must be at most", "number"),
        (f"{STUDY}/frontier?max=size_bytes", 422, "max 'size_bytes' must look like", None),
        (f"{STUDY}/frontier?max=size=3", 422, "no measured objective 'size'", None),
        (f"{STUDY}/pick?max=size_bytes=1", 409, "no point on the frontier of 'mine' has", None),
        (f"{STUDY}/diff?a=1", 422, "b: is required", "b"),
        (f"{STUDY}/diff?a=1&b=nope", 404, "study 'mine' has no trial 'nope'", None),
        (f"{STUDY}/offer?max=nope=1", 422, "no measured objective 'nope'", None),
        ("/api/v1/studies/%00", 404, "no study '\\x00'", None),
        ("/api/v1/studies/" + "9" * 100, 404, "no study '999", None),
        ("/api/v1/exports/77", 404, "no export 77", None),
        ("/api/v1/exports/1/download", 422, "export 1 is queued", None),
    ],
)
def test_errors_say_what_is_wrong(client, path, status, message, field):
    answer = client.get(path)
    told = answer.json()["error"]
    assert told["message"].startswith(message), told
    assert told.get("field") == field
    assert answer.status_code == (409 if "download" in path else status)


def test_the_frontier_is_that_of_the_command_line(open_server, client):
    def run(command, *more):
        return CliRunner().invoke(cli, [command, "mine", *more, "--db", open_server.store.url]).stdout

    assert client.get(f"{STUDY}/frontier").json() == json.loads(run("frontier", "--json"))
    answer = client.get(f"{STUDY}/frontier", params={"max": "size_bytes=100MB"}, headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text == run("frontier", "--max", "size_bytes=100MB", "--csv")
    assert client.get(f"{STUDY}/pick").json() == json.loads(run("pick", "--json"))
    differing = json.loads(run("diff", "1", "uniform-int4", "--json"))
    assert client.get(f"{STUDY}/diff?a=1&b=uniform-int4").json() == differing


def test_the_samplers_view_of_a_running_study_keeps_up(open_server, client):
    from autoq.display.hindsight import hindsight

    store = open_server.store
    study = store.study("mine")
    store.set_state(study.id, "running")
    study = store.study("mine")
    for number in (9, 10):
        view = client.get(f"{STUDY}/frontier").json()["sampler_view"]
        assert view == hindsight(store, study).to_json()["sampler_view"]
        trial = store.start_trial(
            study.id, number, store.trial(study.id, number - 6).assignment, "sampler", None, {"frontier:predicted": 0.5}
        )
        old = store.trial(study.id, 5).measurements.values()
        assert store.finish_trial(trial.id, 1, list(old), {}, 1.0, "local")
        study = store.study("mine")
    view = client.get(f"{STUDY}/frontier").json()["sampler_view"]
    assert view == hindsight(store, study).to_json()["sampler_view"]
    assert view["trials"] == 5


def test_a_tag_changes_with_the_study_and_costs_nothing_until_then(open_server, client, monkeypatch):
    paths = [path for path in SHAPES if path.startswith(STUDY) and "offer" not in path]
    tags = {path: client.get(path).headers["etag"] for path in paths}
    assert len(set(tags.values())) == len(tags), "every address has its own"
    with monkeypatch.context() as patch:
        for name in ("study", "trials", "frontier", "trial", "table"):
            patch.setattr(type(open_server.store), name, None)  # nothing of it is read
        for path, tag in tags.items():
            assert client.get(path, headers={"If-None-Match": f'"other", {tag}'}).status_code == 304
    client.put(f"{STUDY}/trials/3/remark", json={"note": "changed"})
    for path, tag in tags.items():
        again = client.get(path, headers={"If-None-Match": tag})
        assert again.status_code == 200
        assert again.headers["etag"] != tag


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.lists(st.integers(0, 3), max_size=8))
def test_pages_of_trials_have_no_gap_and_no_repeat_while_trials_are_added(open_server, client, limit, added):
    store = open_server.store
    study_id = store.study("theirs").id
    known = store.trial(study_id, 3).assignment
    there = [trial.number for trial in store.trials(study_id)]
    following, seen, growing = None, [], iter(added)
    while True:
        query = {"limit": limit} | ({} if following is None else {"after": following})
        page = client.get("/api/v1/studies/theirs/trials", params=query).json()
        seen += [trial["number"] for trial in page["trials"]]
        following = page["next"]
        if following is None:
            break
        for _ in range(next(growing, 0)):
            store.start_trial(study_id, store.trials(study_id)[-1].number + 1, known, "sampler")
    assert seen == sorted(set(seen))
    assert set(there) <= set(seen)


@pytest.mark.parametrize("sort", ["created", "-created", "name", "-name"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_pages_of_studies_have_no_gap_and_no_repeat(open_server, client, sort, limit):
    from autoq.spec import build_spec

    for name in ("b", "a", "B-2", "zz"):
        open_server.store.create_study(build_spec({"model": {"id": "tiny"}, "name": name}), [("x", "u", "minimize")])
    cursor, seen = None, []
    while True:
        query = {"sort": sort, "limit": limit} | ({} if cursor is None else {"cursor": cursor})
        page = client.get("/api/v1/studies", params=query).json()
        seen += [(study["study"], study["id"]) for study in page["studies"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert len(seen) == 7
    assert seen == sorted(seen, key=lambda one: one[0 if sort.endswith("name") else 1], reverse=sort.startswith("-"))


def test_studies_are_filtered(client):
    def names(**query):
        return [study["study"] for study in client.get("/api/v1/studies", params=query).json()["studies"]]

    assert names(owner="ada") == ["mine"]
    assert names(search="EIR") == ["theirs"]
    assert names(search="%") == []
    assert names(state="finished", sort="name") == ["mine", "nobodys", "theirs"]
    assert names(state=["running", "failed"]) == []


def test_an_assignment_comes_as_json_and_as_yaml(open_server, client):
    import yaml

    wanted = open_server.store.trial(open_server.store.study("mine").id, 3).assignment.to_dict()
    assert client.get(f"{STUDY}/trials/3/assignment").json() == wanted
    answer = client.get(f"{STUDY}/trials/3/assignment?format=yaml")
    assert answer.headers["content-type"].startswith("application/yaml")
    assert yaml.safe_load(answer.text) == wanted


def test_values_that_do_not_count_are_null(client):
    values = client.get(f"{STUDY}/trials/4/values?objective=kl_nats_per_token").json()["values"]
    assert values[0][0] is None
    assert values[1][7] == pytest.approx(0.172, rel=2**-12)
    assert client.get(f"{STUDY}/trials/4/values?objective=size_bytes").status_code == 404


def test_metrics_are_what_prometheus_reads(open_server, client):
    client.get(f"{STUDY}/frontier")
    client.get("/api/v1/studies/none")
    client.get("/nothing-here/abc")
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    assert found["autoq_studies", (("state", "finished"),)] == 3
    assert found["autoq_trials", (("state", "complete"),)] == 21
    assert found["autoq_trials", (("state", "running"),)] == 0
    assert found["autoq_workers", (("state", "busy"),)] == 3
    assert found["autoq_queue_length", ()] == 0
    assert found["autoq_event_streams", ()] == 0
    count = "autoq_request_seconds_count"
    route = (("method", "GET"), ("route", "/api/v1/studies/{study}/frontier"), ("status", "200"))
    assert found[count, route] == 1
    assert found[count, (("method", "GET"), ("route", "/api/v1/studies/{study}"), ("status", "404"))] == 1
    assert found[count, (("method", "GET"), ("route", "(none)"), ("status", "404"))] == 1


def test_readiness_follows_the_scheduler(open_server, client):
    assert client.get("/readyz").json() == {"ready": True, "database": True, "schema_current": True, "scheduler": True}
    open_server.app.state.scheduler.problem = "no process to be had"
    assert client.get("/readyz").status_code == 503


def test_an_export_is_downloaded_as_it_is(open_server, client, tmp_path):
    import io
    import tarfile

    store, folder = open_server.store, tmp_path / "exports" / "1"
    (folder / "sub").mkdir(parents=True)
    contents = {"model.safetensors": b"\1" * 1300, "empty": b"", "sub/one.json": b"{}" * 256}
    for name, body in contents.items():
        (folder / name).write_bytes(body)
    (folder / "link").symlink_to("/etc/passwd")
    assert store.queue.set_export(1, "finished", ["queued"], result={"manifest": {}})
    answer = client.get("/api/v1/exports/1/download")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert 'filename="mine-3-torch-cpu.tar"' in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        found = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}
    assert found == {f"mine-3-torch-cpu/{name}": body for name, body in contents.items()}


def test_many_readers_at_once(open_server):
    paths = [path for path in SHAPES if "offer" not in path]

    def read(path):
        return open_server.client().get(path).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, paths * 3)) == {200}
