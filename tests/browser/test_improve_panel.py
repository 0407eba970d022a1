"""A trial is made better from its page: the button is pressed, the job is followed, and the new trial is opened.

The test does to the database what a runner does, step by step; that real runners do it is shown where they are tested.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from playwright.sync_api import Page, Route, expect

from autoq.assignment import Assignment
from autoq.store import Descent, Origin, Store, StudyRecord, TrialRecord

pytestmark = pytest.mark.timeout(900)
KL = "kl_nats_per_token"


@pytest.fixture
def store(believable: ModuleType, tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "autoq.db")) as store:
        believable.whole(store, "laptop", 24, seed=1)
        yield store


def begun(store: Store, study: StudyRecord, parent: TrialRecord, origin: Origin, digit: str) -> TrialRecord:
    """A new trial that runs, made of another one."""
    assert parent.assignment is not None
    own, digest = parent.assignment, digit * 40
    made = Assignment(own, {**own.trained, next(iter(own)): digest})
    number = len(store.trials(study.id))
    return store.start_trial(study.id, number, made, origin, descent=Descent(parent.number, {}, {digest: b"x"}))


def ended(store: Store, parent: TrialRecord, child: TrialRecord, factor: float) -> None:
    """The child is measured on both parts: its parent's values, but for `factor` times its loss."""
    found = [
        dataclasses.replace(m, value=m.value * (factor if m.objective == KL else 1.0), per_token=None)
        for m in parent.measurements.values()
    ]
    store.finish_trial(child.id, 1, [m for m in found if m.part == "search"], {}, 9.0, "local")
    store.add_measurements(child.id, [m for m in found if m.part == "report"])


def test_a_trial_is_quantized_in_sequence_and_trained_from_its_page(
    opened: Callable[..., Page], served: Callable[[Path], str], store: Store, tmp_path: Path
) -> None:
    study = store.study("laptop")
    frontier = store.frontier(study.id, with_assignments=True)
    parent = next(trial for trial in frontier if trial.baseline is None and (KL, "report") in trial.measurements)
    url = served(tmp_path / "autoq.db")
    page = opened(f"/studies/laptop/trials/{parent.number}", url=url, allowed=("recover",))
    panel = page.get_by_role("region", name="Improve")
    sequence = panel.get_by_role("button", name="Quantize in sequence")
    train = panel.get_by_role("button", name="Train")

    sequence.focus()
    page.keyboard.press("Enter")
    expect(panel.locator(".state.queued")).to_be_visible()
    assert store.table(study.id, "job") == {"kind": "sequential", "trial": parent.number}
    for control in (sequence, train, panel.get_by_label("Steps")):
        expect(control).to_be_disabled()
    store.set_state(study.id, "running")
    expect(panel).to_contain_text("Its layers are quantized, one block after the other.")
    # Whoever comes now sees as much; on other trials' pages it says why there is no button.
    page.reload()
    expect(panel).to_contain_text("Its layers are quantized, one block after the other.")
    other = opened("/studies/laptop/trials/1", url=url)
    told = other.get_by_role("region", name="Improve")
    expect(told.get_by_text("The study is running; trials are made of others once it is finished.")).to_have_count(2)
    expect(told.get_by_role("button", name="Train")).to_be_disabled()

    child = begun(store, study, parent, "sequential", "a")
    expect(panel).to_contain_text(f"Trial {child.number} is measured.")
    ended(store, parent, child, 0.6)
    expect(panel).to_contain_text(f"Trial {child.number} is measured on the report part.")
    store.queue.settle(study.id, "finished")
    expect(panel).to_contain_text(f"Done: it is trial {child.number}.")
    expect(panel).to_contain_text("change−40 %report part")
    expect(page.locator("#facts")).to_contain_text(f"made into trial {child.number}")
    expect(sequence).to_be_disabled()
    expect(panel).to_contain_text(f"It was quantized in sequence before: it is trial {child.number}.")
    expect(told.get_by_role("button", name="Train")).to_be_enabled()  # without being loaded again

    # What cannot be queued is said; what is queued may fail, and that is said, too.
    def refuse(route: Route) -> None:
        told = {"error": {"message": "256 studies wait; no more are taken"}}
        route.fulfill(status=429, content_type="application/json", body=json.dumps(told))

    page.route("**/recover", refuse, times=1)
    steps = panel.get_by_label("Steps")
    steps.fill("7")
    steps.press("Enter")
    expect(panel.get_by_role("alert")).to_have_text("256 studies wait; no more are taken")
    train.click()
    expect(panel.locator(".state.queued")).to_be_visible()
    expect(panel.get_by_role("alert")).to_have_count(0)
    job = store.table(study.id, "job")
    assert job is not None
    assert (job["kind"], job["trial"], job["training"]["steps"]) == ("recover", parent.number, 7)
    store.queue.settle(study.id, "finished", "recover: no moment of the training is better than its start")
    expect(panel.get_by_role("alert")).to_have_text("no moment of the training is better than its start")
    expect(train).to_be_enabled()

    panel.get_by_role("link", name=f"Trial {child.number}", exact=True).last.click()
    expect(page.locator("#facts")).to_contain_text(f"quantized in sequence, of trial {parent.number}")
    expect(sequence).to_be_disabled()
    expect(panel).to_contain_text(f"was quantized in sequence already, from trial {parent.number}.")
    page.goto(f"{url}/studies/laptop/trials/0")
    expect(panel).to_contain_text("No layer of the assignment is quantized")
    expect(train).to_be_disabled()
    for shown in (page, other):
        shown.goto("about:blank")  # before the server ends the streams
