"""llama.cpp in its helper process: numbers, times, and every way that it can end."""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoq.errors import AutoQError
from autoq.models import load
from autoq.spec import ModelSpec
from autoq.targets import _llama_cpp_bridge as bridge
from autoq.targets import _llama_cpp_engine as near
from autoq.targets._gguf_file import write
from autoq.targets._llama_cpp_engine import Engine, EngineError

TOKENS = [1, 200, 30, 4, 77, 250, 5, 5, 101, 9]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load(ModelSpec(id=str(tiny_model_dir("llama")), dtype="float32"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(model, {}, path)
    return path


@pytest.fixture(scope="module")
def engine(file):
    with Engine(file, threads=1, context=64, sequences=2) as engine:
        yield engine


def test_computes_what_transformers_computes(engine, model):
    found = torch.from_numpy(engine.logits(TOKENS)).log_softmax(-1)
    with torch.inference_mode():
        expected = model.outputs(torch.tensor([TOKENS]))[0].log_softmax(-1)
    assert found.shape == (len(TOKENS), engine.vocabulary) == (10, 300)
    assert F.kl_div(found, expected, reduction="batchmean", log_target=True) < 1e-6


def test_every_call_starts_anew(engine):
    first = engine.logits(TOKENS)
    engine.logits(TOKENS[::-1])
    engine.round(np.array([TOKENS, TOKENS]), 2)
    assert np.array_equal(engine.logits(TOKENS), first)
    assert np.allclose(engine.logits(TOKENS[:4]), first[:4], atol=1e-4)


def test_long_inputs_go_in_parts(engine, monkeypatch):
    whole = engine.logits(TOKENS)
    monkeypatch.setattr(near, "_LOGIT_TOKENS", 3)
    assert np.allclose(engine.logits(TOKENS), whole, atol=1e-4)


def test_a_round_times_its_prefill_and_each_step(engine):
    taken = engine.round(np.array([TOKENS, TOKENS]), 5)
    assert len(taken.steps) == 5
    for wall, cpu in (taken.prefill, *taken.steps):
        assert 0 < wall < 60e9
        assert 0 <= cpu < 60e9


def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(EngineError, match="65 tokens do not fit into a context of 64"):
        engine.logits([1] * 65)
    with pytest.raises(EngineError, match=r"model.gguf: llama_decode ended with -1: .*invalid token"):
        engine.logits([300])
    assert engine.logits([1]).shape == (1, 300)  # a refusal ends nothing


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot load the file"), (b"GGUF", "cannot load the file"), (b"PK\3\4" * 99, "invalid magic")],
)
def test_a_file_that_is_none(tmp_path, content, reason):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=rf"llama\.cpp with bad\.gguf: .*{reason}") as caught:
        Engine(path, 1, 32)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off(file, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=r"half\.gguf: it cannot load the file"):
        Engine(path, 1, 32)


def test_closing_ends_the_process(file):
    engine = Engine(file, 1, 32)
    process = engine._process
    engine.close()
    engine.close()
    assert process.returncode == 0
    assert engine.closed
    with pytest.raises(EngineError, match="was closed"):
        engine.logits([1])


def test_a_crash_is_one_line(file):
    with Engine(file, 1, 32) as engine:
        os.kill(engine._process.pid, signal.SIGABRT)
        with pytest.raises(EngineError, match=r"^llama\.cpp with model\.gguf ended by SIGABRT"):
            engine.logits([1])
        assert engine.closed
    assert issubclass(EngineError, AutoQError)


def test_a_failed_assertion_is_told(file):
    """More sequences in a batch than the context has: llama.cpp says so or ends; either is one line."""
    with Engine(file, 1, 32) as engine:
        engine._sequences = 4
        with pytest.raises(EngineError, match=r"^llama\.cpp with model\.gguf") as caught:
            engine.round(np.array([TOKENS] * 4), 1)
    assert "\n" not in str(caught.value)


def test_an_interrupted_request_leaves_no_reply_behind(file, monkeypatch):
    with Engine(file, 1, 32) as engine:

        def interrupt(count):
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.logits([1])
        assert engine.closed


def test_the_process_does_not_outlive_its_parent(file):
    program = f"""
import os
from pathlib import Path
from autoq.targets._llama_cpp_engine import Engine
engine = Engine(Path({str(file)!r}), 1, 32)
print(engine._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    child = int(ended.stdout)
    for _ in range(600):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and whoever inherited it has not looked yet
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} still runs")


def test_an_unknown_layout_is_refused():
    session = object.__new__(bridge.Session)

    class Library:
        @staticmethod
        def llama_context_default_params():
            parameters = bridge._Opaque()
            parameters.words[0] = 4096
            return parameters

    session._library = Library()
    with pytest.raises(bridge.Refused, match="begin with 4096, 0, 0, 0, not with"):
        session.open("x.gguf", 1, 8, 1)


@pytest.mark.skipif(ctypes.util.find_library("c") is None, reason="no C library by that name on this system")
def test_a_library_that_is_another_is_refused():
    with pytest.raises(bridge.Refused, match="has no function llama_"):
        bridge.Session(ctypes.util.find_library("c"))


def test_without_the_package_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(near.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="xllamacpp"):
        Engine(tmp_path / "x.gguf", 1, 8)


def test_the_documented_server_says_the_same_token(file, engine):
    """xllamacpp.Server is the package's own interface to the same library."""
    program = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.cpuparams.n_threads = 64, 1, False, 1
answer = xllamacpp.Server(parameters).handle_completions(
    {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "temperature": 0.0, "top_k": 1, "n_probs": 1}
)
print(json.dumps([entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(file), json.dumps(TOKENS)], capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == [int(engine.logits(TOKENS)[-1].argmax())]
