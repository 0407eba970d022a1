"""Observers: what a running study says, in a terminal and in a log."""

import dataclasses
import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from autoq.display.progress import PlainObserver, RichObserver
from autoq.measurement import Measurement
from autoq.search.sampler_view import PREDICTED
from autoq.store import StudyObjective, TrialError, TrialRecord

OBJECTIVES = [
    StudyObjective("kl_nats_per_token", "nats/token", "minimize"),
    StudyObjective("size_bytes", "bytes", "minimize"),
]


def trial(number, value, **changes):
    record = TrialRecord(
        id=number, study_id=1, study="s", number=number, state="complete", origin="sampler", baseline=None, hash="h",
        duplicate_of=None, attempt=1, changed=1, feasible=True, on_frontier=True, violations={}, sampler_attrs={},
        error=None, worker="local", seconds=1.0, created_at=datetime.now(UTC), finished_at=None,
        measurements={
            ("kl_nats_per_token", "search"): Measurement(
                "kl_nats_per_token", value, "nats/token", "measured", "search", 0.01),
            ("size_bytes", "search"): Measurement("size_bytes", 1e6 + number, "bytes", "computed", "search"),
        },
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def play(observer):
    with observer:
        observer.study("s", {"model": "m", "layers": 2, "trials": 4})
        observer.stage("load", 1)
        observer.advance()
        observer.stage("search", 4)
        observer.advance(0)
        observer.trial(trial(0, 0.5), 1, 4)
        observer.trial(trial(1, 0.1, feasible=False, on_frontier=False), 2, 4)
        failure = {
            "state": "failed",
            "feasible": None,
            "on_frontier": False,
            "error": TrialError("NotFinite", "kl is NaN", ""),
        }
        observer.trial(trial(2, 0.05, **failure), 3, 4)
        observer.note("something odd")
        observer.trial(trial(3, 0.3), 4, 4)


def test_plain_lines():
    out = io.StringIO()
    play(PlainObserver(Console(file=out, width=80), OBJECTIVES))
    assert out.getvalue().splitlines() == [
        "study s of m: 2 layers, 4 trials",
        "loading the model",
        "searching (4)",
        "trial 2 failed: NotFinite: kl is NaN",
        "something odd",
        "4/4 trials; 1 failed; best so far: kl_nats_per_token 0.3000 nats/token, size_bytes 1.000 MB",
    ]


def test_the_live_display_leaves_what_matters():
    out = io.StringIO()
    observer = RichObserver(Console(file=out, width=100, force_terminal=True), OBJECTIVES)
    play(observer)
    assert "trial 2 failed: NotFinite: kl is NaN" in out.getvalue()
    assert "something odd" in out.getvalue()
    assert observer.failed == 1
    assert observer.best == "best so far: kl_nats_per_token 0.3000 nats/token, size_bytes 1.000 MB"


def test_best_follows_the_direction():
    observer = PlainObserver(
        Console(file=io.StringIO()), [StudyObjective("kl_nats_per_token", "nats/token", "maximize")]
    )
    for number, value in enumerate((0.5, 0.9, 0.7)):
        observer.trial(trial(number, value), number + 1, 10)
    assert observer.best == "best so far: kl_nats_per_token 0.9000 nats/token"


def test_best_is_what_the_search_gained_over_a_baseline_worth_beating():
    observer = PlainObserver(Console(file=io.StringIO()), OBJECTIVES)
    observer.trial(trial(0, 0.0, baseline="unquantized"), 1, 10)
    assert observer.best == "best so far: uniform baselines only"
    observer.trial(trial(1, 0.40, baseline="uniform-int4"), 2, 10)
    # larger and worse than the other one: to be far ahead of it means nothing
    observer.trial(trial(2, 9.00, baseline="uniform-broken"), 3, 10)
    observer.trial(trial(3, 0.10), 4, 10)
    assert observer.best == (
        "best so far: trial 3 against uniform-int4: 1.00 × its size_bytes and "
        "0.25 × its kl_nats_per_token (0.1 against 0.4)"
    )


def test_long_stages_say_how_far_they_are(monkeypatch):
    now, out = 100.0, io.StringIO()
    monkeypatch.setattr("autoq.display.progress.time.monotonic", lambda: now)
    observer = PlainObserver(Console(file=out, width=80))
    observer.stage("report", 60)
    observer.advance()
    now = 111.0
    observer.advance()
    observer.advance()
    now = 122.0
    observer.advance(57)
    said = out.getvalue().splitlines()
    assert said == [
        "measuring the frontier on the report data (60)",
        "measuring the frontier on the report data: 2/60",
    ]


def test_the_pace_counts_this_run_only(monkeypatch):
    observer = PlainObserver(Console(file=io.StringIO()))
    now = 100.0
    monkeypatch.setattr("autoq.display.progress.time.monotonic", lambda: now)
    observer.stage("search", 20)
    observer.advance(10)
    assert observer.pace() == ""
    now = 160.0
    observer.count(trial(10, 0.5), 12, 20)
    assert observer.pace() == "2.0 trials/min, 4m 00s left"


@pytest.mark.parametrize("kind", [PlainObserver, RichObserver])
def test_leaving_by_an_exception_ends_the_display(kind):
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), kind(console):
        raise KeyboardInterrupt
    console.print("still usable")


def test_the_samplers_own_view_is_shown_as_it_goes():
    out = io.StringIO()
    observer = PlainObserver(Console(file=out, width=200), OBJECTIVES)
    for number in range(8):
        predicted = 0.1 * (number + 1)
        proposed = trial(number, 1.2 * predicted, sampler_attrs={PREDICTED: predicted}, on_frontier=False)
        observer.trial(proposed, number + 1, 8)
    expected = "sampler's own predictions: rank correlation 1.00, measured / predicted 1.20 (8 trials)"
    assert out.getvalue().splitlines()[-1] == f"8/8 trials; {expected}"
