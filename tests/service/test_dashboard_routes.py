"""What the dashboard's pages are made of: static files, points by columns, overviews, and pages that hold no markup of
anybody's."""

from __future__ import annotations

import gzip
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

from autoq import plugins
from autoq.service.app import create_app
from autoq.spec import build_spec
from autoq.store import Prepared, Store, WorkerRecord

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(believable: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Store.open(str(tmp_path_factory.mktemp("pages") / "autoq.db")) as found:
        believable.whole(found, "laptop", 30)
        yield found


@pytest.fixture(scope="module")
def client(written: Store) -> Any:
    with TestClient(create_app(written), base_url="http://localhost:8800") as found:
        yield found


def get(client: TestClient, path: str, **headers: str) -> Any:
    return client.get(path, headers={"Accept": "text/html", **headers})


PAGES = ["/", "/new", "/compare", "/login", "/studies/laptop", "/studies/laptop/trials/3", "/studies/laptop/diff"]


@pytest.mark.parametrize("path", PAGES)
def test_pages_run_no_inline_code_and_name_files_that_are_there(client: TestClient, path: str) -> None:
    page = get(client, path)
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"\son\w+=|javascript:|<style|\sstyle=", page.text)
    for script in re.findall(r"<script([^>]*)>", page.text):
        assert "src=" in script or 'type="application/json"' in script
    named = set(re.findall(r'(?:src|href|data-plotly)="(/static/[^"]+)"', page.text))
    assert named
    for address in named:
        found = client.get(address)
        assert found.status_code == 200, address
        assert "immutable" in found.headers["cache-control"]
        assert found.headers["content-encoding"] == "gzip"
        whole = client.get(address, headers={"Accept-Encoding": "identity"})
        assert whole.content == found.content, address


def test_files_of_another_version_are_not_given(client: TestClient) -> None:
    answer = client.get("/static/0000000000000000/autoq.css")
    assert answer.status_code == 404
    assert "load the page again" in answer.text
    assert client.get("/static/0000000000000000/..%2Fpalette.py").status_code == 404


def test_plotly_is_the_installed_package_s_own_and_is_sent_compressed(client: TestClient) -> None:
    import plotly

    page = get(client, "/studies/laptop").text
    (address,) = re.findall(r'data-plotly="([^"]+)"', page)
    own = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    assert client.get(address).content == own.read_bytes()
    assert len(gzip.compress(own.read_bytes(), 9)) < 1_700_000


def test_what_is_stored_is_text_in_a_page(client: TestClient, written: Store) -> None:
    study = written.study("laptop")
    (failed,) = written.trials(study.id, states=("failed",))
    assert failed.error is not None and "<script>" in failed.error.message
    page = get(client, f"/studies/laptop/trials/{failed.number}")
    assert "<script>alert" not in page.text
    assert "\\u003cscript\\u003ealert" in page.text


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/studies/nothing", 404, "no study"),
        ("/studies/laptop/trials/999", 404, "no trial 999"),
        ("/studies/laptop/trials/x", 422, "number"),
        ("/nowhere", 404, "nothing here"),
    ],
)
def test_a_browser_is_told_in_a_page(client: TestClient, path: str, status: int, words: str) -> None:
    answer = get(client, path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert words in answer.text


def test_points_are_the_store_s_trials(client: TestClient, written: Store) -> None:
    study = written.study("laptop")
    trials = written.trials(study.id)
    found = client.get("/api/v1/studies/laptop/points").json()
    assert found["columns"]["number"] == [trial.number for trial in trials]
    assert [o["name"] for o in found["objectives"]] == [o.name for o in study.objectives]
    for place, trial in enumerate(trials):
        assert found["columns"]["state"][place] == trial.state
        assert found["columns"]["baseline"][place] == trial.baseline
        assert found["columns"]["on_frontier"][place] == trial.on_frontier
        for name, own in found["measured"].items():
            best, searched = trial.best_measurements().get(name), trial.measurements.get((name, "search"))
            assert own["value"][place] == (pytest.approx(best.value, rel=1e-7) if best else None)
            assert own["kind"][place] == (best.kind if best else None)
            assert own["part"][place] == (best.part if best else None)
            assert own["search"][place] == (pytest.approx(searched.value, rel=1e-7) if searched else None)


def test_points_since_are_those_that_changed(client: TestClient, written: Store, believable: ModuleType) -> None:
    study = written.study("laptop")
    assert client.get(f"/api/v1/studies/laptop/points?since={study.changes}").json()["columns"]["number"] == []
    writer = believable.Writer(written, study, seed=8)
    number = writer.trial(writer.proposal(0.35))
    found = client.get(f"/api/v1/studies/laptop/points?since={study.changes}").json()
    assert number in found["columns"]["number"]
    assert found["changes"] == written.study("laptop").changes
    changed = {trial.number for trial in written.trials(study.id, changed_since=study.changes)}
    assert set(found["columns"]["number"]) == changed


def test_an_overview_says_what_was_gained(client: TestClient, written: Store) -> None:
    from autoq.display.compare import gains

    study = written.study("laptop")
    uniform = [trial for trial in written.trials(study.id, states=("complete",)) if trial.baseline]
    best = gains(written.frontier(study.id), uniform, study.objectives)[0]
    found = client.get("/api/v1/studies/laptop/overview").json()
    assert found["trial"] == best.point.number
    assert found["headline"].startswith(f"Trial {best.point.number} has {best.ratios[best.quality]:.2f} × the KL")
    assert found["spark"].startswith("M")
    assert found["budget"] == 30


def test_an_overview_of_a_study_without_a_result(client: TestClient, written: Store, believable: ModuleType) -> None:
    believable.Writer.new(written, "young")
    found = client.get("/api/v1/studies/young/overview").json()
    assert (found["headline"], found["trial"], found["spark"]) == (None, None, "")


def test_every_figure_is_to_be_had(client: TestClient) -> None:
    from autoq.dashboards import figures

    for name in figures.names():
        options = {"layer_map": "?trial=4", "which_layers_pay": "?trial=4", "diff_map": "?a=4&b=uniform-int4"}
        answer = client.get(f"/api/v1/studies/laptop/figures/{name}{options.get(name, '')}")
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"plotly", "table", "title", "note"}
    wrong = client.get("/api/v1/studies/laptop/figures/frontier?x=speed")
    assert wrong.status_code == 422
    assert "speed" in wrong.json()["error"]["message"]


def test_summaries_are_read_by_many_threads_at_once() -> None:
    plugins.summary.cache_clear()
    names = [("methods", name) for name in plugins.names("methods")] * 8
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: plugins.summary.__wrapped__(*each), names))
    assert all(found)


def test_modules_say_what_they_are_for() -> None:
    """Every module begins with a comment, and none writes markup."""
    for file in (ROOT / "dashboards" / "static").glob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert text.startswith("/*"), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file.name
        assert len(text.splitlines()) <= 500, file.name


def test_no_figure_shows_another_user_s_study(believable: ModuleType, tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "two.db")) as store:
        for owner, name in (("ada", "mine"), ("bob", "theirs")):
            spec = build_spec({"name": name, "model": {"id": "demo:smollm2"}})
            store.queue.submit(owner, None, name, spec, Prepared(believable.OBJECTIVES, {}))
        ada, _ = store.accounts.create("a", "ada", "viewer")
        admin, _ = store.accounts.create("b", "bob", "admin")
        with TestClient(create_app(store), base_url="http://localhost:8800") as client:

            def ask(secret: str, others: str) -> Any:
                address = f"/api/v1/studies/mine/figures/compare?studies={others}"
                return client.get(address, headers={"Authorization": f"Bearer {secret}"})

            assert ask(ada, "mine").status_code == 200
            hidden, missing = ask(ada, "theirs"), ask(ada, "no-such")
            assert (hidden.status_code, missing.status_code) == (404, 404)
            assert hidden.json()["error"]["message"] == missing.json()["error"]["message"].replace("no-such", "theirs")
            assert ask(admin, "theirs").status_code == 200


def test_a_report_is_a_file_to_keep_and_no_page_of_this_server(client: TestClient, written: Store) -> None:
    answer = client.get("/api/v1/studies/laptop/report")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="laptop.html"'
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert "laptop" in answer.text
    assert (
        client.get("/api/v1/studies/laptop/report", headers={"If-None-Match": answer.headers["etag"]}).status_code
        == 304
    )
    written.create_study(build_spec({"model": {"id": "m"}, "name": "bare"}), [("size_bytes", "bytes", "minimize")])
    none = client.get("/api/v1/studies/bare/report")
    assert none.status_code == 409
    assert "there is nothing to report yet" in none.json()["error"]["message"]


def test_the_list_counts_who_is_at_work_and_says_so_at_once(client: TestClient, written: Store) -> None:
    def listed() -> Any:
        answer = client.get("/api/v1/studies")
        return {study["study"]: study["workers"] for study in answer.json()["studies"]}, answer.headers["etag"]

    study = written.study("laptop")
    before, tag = listed()
    assert before["laptop"] == 0
    written.queue.beat([WorkerRecord(f"host:{i}", "host", "cpu", "busy", study.id) for i in range(3)])
    during, other = listed()
    assert (during["laptop"], tag != other) == (3, True)
    written.queue.forget_workers([f"host:{i}" for i in range(3)])
    assert listed()[0]["laptop"] == 0
