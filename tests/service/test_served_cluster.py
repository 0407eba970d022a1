"""Studies on a Ray cluster through the whole service: `autoq serve`, its runners, a cluster, all of them real."""

from __future__ import annotations

import time

import httpx
import pytest

from autoq.store import Store

PLACES, TRIALS = 1, 24


def spec_for(model, address, name, **more):
    return {
        "name": name,
        "model": {"id": str(model)},
        "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-channel-sym", "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 10, "report_points": 1},
        "workers": {"executor": "ray", "address": address, "count": PLACES, "cpus": 1},
    } | more


def state(client, name):
    return client.get(f"/api/v1/studies/{name}").json()


def until(client, name, *states, seconds=600.0):
    end = time.monotonic() + seconds
    while (study := state(client, name))["state"] not in states:
        assert time.monotonic() < end, study
        assert study["state"] != "failed", study
        time.sleep(0.1)
    return study


def trials(client, name):
    found = client.get(f"/api/v1/studies/{name}/trials?limit=200").json()["trials"]
    return [trial for trial in found if trial["state"] != "running"]


def some_trial(client, name):
    end = time.monotonic() + 600
    while not any(trial["state"] == "complete" for trial in trials(client, name)):
        assert time.monotonic() < end, state(client, name)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_studies_share_a_cluster(serve, ray_cluster, tiny_model_dir, tmp_path, monkeypatch):
    """Two studies want all of a cluster. One gives way to the other between trials; the server ends and another comes
    in the middle; one finishes, and the other is cancelled, which gives the cluster back."""
    ray_cluster.add("head", cpus=PLACES)
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    ray_cluster.enter(monkeypatch)
    options = ("--cpus", "1", "--cluster", ray_cluster.address, "--places", str(PLACES))
    process = serve(*options)
    with httpx.Client(base_url=process.url, timeout=60) as client:
        for name, count, priority in (("long", 3000, -1), ("short", TRIALS, 0)):
            wanted = spec_for(tiny_model_dir("llama"), ray_cluster.address, name, budget={"trials": count})
            assert client.post("/api/v1/studies", json={"spec": wanted, "priority": priority}).status_code == 201
            if name == "long":
                until(client, name, "running")
        some_trial(client, "long")
        assert state(client, "short")["state"] == "queued"  # the other one is as wide as the cluster
        with Store.open(str(tmp_path / "autoq.db")) as store:  # what the policy does after a quantum
            store.queue.ask(state(client, "long")["id"], "yield")
        some_trial(client, "short")
        assert state(client, "long")["state"] == "queued"
        assert process.stop()[0] == 0
    process = serve(*options)
    with httpx.Client(base_url=process.url, timeout=60) as client:
        assert client.post("/api/v1/studies/long/cancel").status_code in (200, 202)
        assert until(client, "short", "finished")["message"] is None
        done = trials(client, "short")
        assert [trial["number"] for trial in done] == list(range(len(done)))
        assert [trial["state"] for trial in done].count("complete") == TRIALS
        assert state(client, "long")["state"] == "cancelled"
        with Store.open(str(tmp_path / "autoq.db")) as store:
            assert store.table(state(client, "short")["id"], "loading")["seconds"] > 0
        assert process.stop()[0] == 0
