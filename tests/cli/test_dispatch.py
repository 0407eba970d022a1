"""What a study has imported, and whether garbage is collected, at the moment at which its first trial goes out."""

import json
import os
import subprocess
import sys

# What AutoQ has for other purposes: pictures, hubs of data, tasks, clusters, services, other targets; and what
# transformers imports where it finds it and is asked for pictures or metrics.
ELSEWHERE = {
    *("compressed_tensors", "datasets", "fastapi", "lm_eval", "matplotlib", "onnx", "onnxruntime", "pandas"),
    *("plotly", "pyarrow", "ray", "rouge_score", "sacrebleu", "sklearn", "torchvision", "uvicorn", "xllamacpp"),
}

FIRST = """
import gc, json, os, sys
from autoq.search import controller

def tell(self, *_):
    print(json.dumps([gc.isenabled(), gc.get_freeze_count() > 100_000, sorted(sys.modules)]), flush=True)
    os._exit(0)

controller._Run._dispatch = tell
from autoq.cli import main
main()
"""


def test_the_first_trial_waits_for_nothing_that_it_does_not_need(tmp_path, tiny_model_dir):
    spec = {
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int4-g32", "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 4},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-c", FIRST, "search", "spec.yaml", "--quiet"],
        cwd=tmp_path,
        env={**os.environ, "AUTOQ_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    collects, frozen, modules = json.loads(done.stdout)
    # Imports are over, and what they made is not looked through again.
    assert (collects, frozen) == (True, True)
    assert not ELSEWHERE & set(modules), sorted(ELSEWHERE & set(modules))
    assert {"torch", "transformers", "optuna"} <= set(modules)
