"""A training that is interrupted and killed for real goes on with the same command, to the same weights."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = """
name: tiny
model: {{id: {model}, dtype: float32}}
data: {{source: {text}, calibration_tokens: 128, search_tokens: 128, report_tokens: 128, window_tokens: 64}}
target: {{name: generic}}
space: {{methods: [rtn], bits: [2, 4, 8], group_size: [32]}}
objectives: [kl_nats_per_token, size_bytes]
sampler: {{name: random, seeds: 0}}
budget: {{trials: 5}}
"""
RECOVER = ("recover", "tiny", "uniform-int4", "--steps", "300")
BLOCKS = (*RECOVER, "--how", "blocks")


@pytest.fixture
def start(commands, tiny_model_dir, tmp_path):
    """Start a command line on one thread in a folder with a cache of its own."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} makes {i * (i % 7)}, as everybody knows.\n" for i in range(200)))
    (tmp_path / "spec.yaml").write_text(SPEC.format(model=tiny_model_dir("llama"), text=text))
    environment = os.environ | {"AUTOQ_CACHE": str(tmp_path / "cache")}
    return functools.partial(commands.start, cwd=tmp_path, env=environment)


def stopped_in_training(process, how, after="step "):
    """Send `how` once a line that begins with `after` was said; all that was said on standard error."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(after):
            process.send_signal(how)
            break
    rest = process.communicate(timeout=200)[1]
    return "".join(said) + rest


@pytest.mark.parametrize(
    ("command", "first", "place"), [(RECOVER, "step ", "step"), (BLOCKS, "block 1 of 2", "block 2")]
)
def test_a_training_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(start, tmp_path, command, first, place):
    searched = start("search", "spec.yaml", "--quiet")
    assert searched.communicate(timeout=200)[1] == ""
    for name in ("whole.db", "searched.db"):
        shutil.copy(tmp_path / "autoq.db", tmp_path / name)
    whole = start(*command, "--db", "whole.db", "--json", "--quiet")
    reference = json.loads(whole.communicate(timeout=250)[0])

    while True:
        process = start(*command)
        said = stopped_in_training(process, signal.SIGINT, first)
        if process.returncode != 0:
            assert process.returncode == 130, said
            assert said.endswith("autoq: interrupted; the same command goes on with the training\n")
            assert "Traceback" not in said
            (checkpoint,) = (tmp_path / "cache" / "recovery").iterdir()
            process = start(*command)
            said = stopped_in_training(process, signal.SIGKILL)
            assert f"going on from {place}" in said
            if process.returncode != 0:
                break
        # It was through before the signal came: from the beginning, on the study as it was.
        for left in tmp_path.glob("autoq.db*"):
            left.unlink()
        shutil.copy(tmp_path / "searched.db", tmp_path / "autoq.db")
    assert process.returncode == -signal.SIGKILL, said
    assert checkpoint.exists()

    # Neither left a trial behind, nor the study otherwise than finished.
    last = start(*command, "--json")
    printed, said = last.communicate(timeout=250)
    assert last.returncode == 0, said
    assert f"going on from {place}" in said
    found = json.loads(printed)
    for key in ("hash", "number", "parent", "origin", "assignment"):
        assert found[key] == reference[key], key
    for name, measurement in reference["measurements"].items():
        assert found["measurements"][name]["value"] == measurement["value"]
    assert not checkpoint.exists()
