"""From a request to a frontier: `autoq serve`, its backroom, its scheduler, a runner, all of them real."""

from __future__ import annotations

import json
import time

import httpx
import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_is_submitted_run_followed_and_read(serve, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    spec = {
        "name": "whole",
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 128, "window_tokens": 64},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym", "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 8, "report_points": 2},
        "workers": {"cpus": 1},
    }
    process = serve("--cpus", "1")
    with httpx.Client(base_url=process.url, timeout=300) as client:
        wrong = client.post("/api/v1/specs:check", json={"spec": {**spec, "model": {"id": "nowhere"}}, "deep": True})
        assert wrong.json()["ok"] is False
        assert "nowhere" in wrong.json()["message"]
        made = client.post("/api/v1/studies", json={"spec": spec}, headers={"Idempotency-Key": "once"})
        assert made.status_code == 201, made.text
        again = client.post("/api/v1/studies", json={"spec": spec}, headers={"Idempotency-Key": "once"})
        assert (again.status_code, again.json()["id"]) == (200, made.json()["id"])
        told, until = {}, time.monotonic() + 400
        with client.stream("GET", f"/api/v1/studies/whole/events?since={made.json()['changes']}") as following:
            for line in following.iter_lines():
                assert time.monotonic() < until, told
                if line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    told |= {trial["number"]: trial["state"] for trial in data["trials"]}
                    if data["study"]["state"] not in ("queued", "running"):
                        break
        study = client.get("/api/v1/studies/whole").json()
        assert study["state"] == "finished", study["message"]
        trials = client.get("/api/v1/studies/whole/trials").json()["trials"]
        assert {trial["number"]: trial["state"] for trial in trials} == told
        frontier = client.get("/api/v1/studies/whole/frontier").json()
        assert frontier["trials"]
        assert frontier["trials"][0]["assignment"]
        assert client.get("/readyz").json()["ready"] is True
    assert process.process.poll() is None
    assert process.stop()[0] == 0
