"""The specs that ship: valid, explained, and using what they say they use."""

import pytest

from autoq.spec import load_spec, shipped_specs

NAMES = ["cluster", "demo", "edge-npu", "encoder", "llama-8b-gpu", "llama-cpp", "qwen-llama-cpp"]


def test_these_are_shipped():
    assert sorted(shipped_specs()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_and_explained(name):
    assert load_spec(name).name == name
    text = shipped_specs()[name]
    assert text.startswith("# ")
    assert f"autoq search {name}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_demo_needs_no_hub_and_no_ray():
    spec = load_spec("demo")
    assert (spec.model.id, spec.data.source) == ("demo:smollm2", "python-docs")
    assert (spec.workers.executor, spec.target.name, spec.target.threads) == ("local", "torch-cpu", 2)
    assert spec.objectives == ("kl_nats_per_token", "size_bytes", "latency_decode_ms")


def test_what_has_no_kernels_and_no_description_has_no_latency():
    for name in NAMES:
        spec = load_spec(name)
        timed = [objective for objective in spec.measured if objective.startswith("latency_")]
        assert bool(timed) == (spec.target.name in ("torch-cpu", "llama-cpp", "described")), name
