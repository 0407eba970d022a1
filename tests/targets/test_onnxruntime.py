"""Exported ONNX models: they compute what was searched, say what they are, and are timed as they run."""

from __future__ import annotations

import json
from dataclasses import asdict

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoq import plugins
from autoq.assignment import Assignment
from autoq.calibration import curvature
from autoq.errors import ExportBroken, ModelRefused, SpecError
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.models import load
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import ModelSpec, TargetSpec, build_spec
from autoq.store import Store
from autoq.targets import Target
from autoq.targets import _onnx_costs as costs
from autoq.targets import _onnx_graph as graphs
from autoq.targets import _onnx_session as sessions
from autoq.targets._onnx_forms import differences

MIX = (
    *("rtn-int4-g32", "rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn", "rtn-int4-g16-sym-a8dyn"),
    *("rtn-int8-channel-sym-a8static", "rtn-int8-g16-a8dyn", "rtn-int4-channel-sym", "keep"),
)
WORKLOAD = TargetSpec(name="onnxruntime", prompt_tokens=24, batch_size=2, threads=1)
TARGET = plugins.load("targets", "onnxruntime", Target)


def dealt(model, schemes=MIX):
    """Quantized weights for every layer, the schemes in turn where they run."""
    weights = {}
    for index, layer in enumerate(model.info.layers):
        turn = [parse_scheme(schemes[(index + shift) % len(schemes)]) for shift in range(len(schemes))]
        scheme = next((s for s in turn if TARGET.refuses(layer, s) is None), Keep())
        weights[layer.name] = plugins.load("methods", scheme.method, Method).quantize(model.weight(layer.name), scheme)
    return weights


def assignment_of(weights):
    return Assignment({name: weight.scheme for name, weight in weights.items()})


class Case:
    """A tiny model, its statistics, and an export of a mix of everything."""

    def __init__(self, folder, out):
        self.model = load(ModelSpec(id=str(folder), dtype="float32"))
        self.ids = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))
        gathered = curvature.gather(self.model, self.ids, 0)
        self.statistics = lambda name: gathered[name]
        self.weights = dealt(self.model)
        self.folder = out
        self.exported = TARGET.export(self.model, self.weights, out, self.statistics)

    @torch.no_grad()
    def searched(self, ids):
        """What a search evaluates for a window (tokens,)."""
        functions = {
            name: function
            for name, weight in self.weights.items()
            if (function := TARGET.activation(weight.scheme, self.statistics(name))) is not None
        }
        self.model.swap({name: weight.dequantize() for name, weight in self.weights.items()}, functions)
        try:
            return self.model.outputs(ids.unsqueeze(0))[0]
        finally:
            self.model.restore()


@pytest.fixture(scope="module")
def case(tiny_model_dir, tmp_path_factory):
    return Case(tiny_model_dir("bert-mlm"), tmp_path_factory.mktemp("onnx"))


def check_export(case):
    """The reloaded export computes what was searched: what quantization itself does is far larger."""
    with TARGET.reload(case.folder, threads=1) as runtime:
        assert runtime.differences(assignment_of(case.weights)) == []
        for ids in case.ids[:2]:
            with torch.no_grad():
                original = case.model.outputs(ids.unsqueeze(0))[0]
            searched, found = case.searched(ids), runtime.outputs(ids)
            assert found.dtype == torch.float32
            assert found.shape == searched.shape
            # An input that lies between two levels of 8 bits may fall to either; most runs have none.
            assert (found - searched).norm() < 0.1 * (searched - original).norm()


def test_the_export_computes_what_was_searched(case):
    assert {str(w.scheme) for w in case.weights.values()} >= set(MIX[:-1])
    check_export(case)


@pytest.mark.slow
@pytest.mark.untraced  # torch.export is a third faster for it; other tests run our lines
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "gpt2", "llama-tied", "qwen3"])
def test_families(family, tiny_model_dir, tmp_path):
    check_export(Case(tiny_model_dir(family), tmp_path))


def test_the_files(case):
    names = {path.name for path in case.folder.iterdir()}
    assert case.exported.weights == ("model.onnx",)
    assert {"model.onnx", "config.json", "tokenizer.json"} <= names
    proto = onnx.load(case.folder / "model.onnx")
    onnx.checker.check_model(proto)
    assert [entry.name for entry in proto.graph.input] == ["input_ids", "attention_mask"]
    assert [entry.name for entry in proto.graph.output] == ["logits"]
    dimensions = proto.graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_param for dimension in dimensions] == ["batch", "tokens"]
    text = (case.folder / "model.onnx").read_bytes()
    assert b".py" not in text  # stack traces of the exporter name files of this machine


def test_bytes_are_those_that_are_counted(case):
    size = (case.folder / "model.onnx").stat().st_size
    layers = sum(layer.nbytes(case.weights[layer.name].scheme) for layer in case.model.info.layers)
    promised = TARGET.other_bytes(case.model.info, ModelSpec(id="tiny")) + layers
    # A tiny model is mostly graph; per layer, the graph is known to within half a kilobyte.
    assert abs(size - promised) < 500 * len(case.model.info.layers)


@pytest.mark.slow
@pytest.mark.untraced
def test_the_file_depends_on_nothing_but_the_model(case, tiny_model_dir, tmp_path):
    again = load(ModelSpec(id=str(tiny_model_dir("bert-mlm")), dtype="float32"))
    TARGET.export(again, dealt(again), tmp_path, case.statistics)
    assert (tmp_path / "model.onnx").read_bytes() == (case.folder / "model.onnx").read_bytes()


def test_padding_changes_nothing(case):
    # Weight-only, as one range for a whole batch sees its padding.
    weights = dealt(case.model, ("rtn-int4-g32", "rtn-int8-channel-sym"))
    session = sessions.open_session(graphs.assemble(case.model, weights), 1)
    ids = case.ids[:2].clone()
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    alone = session.run(None, sessions.feed_of(["input_ids", "attention_mask"], ids[1:, :20]))[0]
    ids[1, 20:] = 3
    together = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert abs(together[1, :20] - alone[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("now", "wanted", "said"),
    [
        ("rtn-int4-g32", "rtn-int4-g16", ["4 bits, ", "zero points, inputs in float32", "says rtn-int4-g16"]),
        ("rtn-int4-g32", "rtn-int4-g32-sym", ["zero points", "symmetric"]),
        ("rtn-int4-g32", "rtn-int4-g32-a8dyn", ["inputs in float32", "inputs in 8 bits per block"]),
        ("rtn-int8-channel-sym", "keep", ["8 bits", "says keep (float32)"]),
        ("rtn-int8-channel-sym-a8dyn", "rtn-int8-channel-sym", ["by their range", "inputs in float32"]),
        ("rtn-int8-channel-sym-a8dyn", "rtn-int8-tensor-sym-a8dyn", ["x1 scales", "1x1 scales"]),
        ("rtn-int8-channel-sym-a8static", "rtn-int8-channel-sym-a8dyn", ["calibrated range", "by their range"]),
        ("keep", "rtn-int4-g32", ["float32", "4 bits"]),
    ],
)
def test_differences_name_layer_and_both_formats(case, now, wanted, said):
    right = assignment_of(case.weights).to_dict()
    linear = {layer.name for layer in case.model.info.layers if layer.kind == "linear"}
    layer = next(name for name, text in right.items() if text == now and name in linear)
    with TARGET.reload(case.folder) as runtime:
        (line,) = runtime.differences(Assignment.from_dict({**right, layer: wanted}))
    assert line.startswith(f"{layer}: the file has ")
    for part in said:
        assert part in line


def test_a_layer_that_is_not_in_the_file_is_a_difference(case):
    proto = onnx.load(case.folder / "model.onnx")
    proto.graph.node.remove(next(node for node in proto.graph.node if node.name == "cls.predictions.decoder"))
    (line,) = differences(proto, assignment_of(case.weights))
    assert line.startswith("cls.predictions.decoder: the file has no node of that name")


def test_another_table_under_a_layer_is_a_difference(case):
    proto = onnx.load(case.folder / "model.onnx")
    layer = next(name for name, weight in case.weights.items() if str(weight.scheme) == "rtn-int4-g32")
    (codes,) = [constant for constant in proto.graph.initializer if constant.name == f"{layer}.codes"]
    codes.name = "other.codes"
    next(node for node in proto.graph.node if node.name == layer).input[1] = "other.codes"
    (line,) = differences(proto, assignment_of(case.weights))
    assert line.startswith(f"{layer}: the file has a MatMulNBits that reads ")
    assert "other.codes" in line


def test_broken_files_are_refused_in_one_line(case, tmp_path):
    with pytest.raises(ExportBroken, match=r"model\.onnx is missing"):
        TARGET.reload(tmp_path)
    whole = (case.folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportBroken, match=r"model\.onnx: ONNX Runtime does not load") as caught:
        TARGET.reload(tmp_path)
    assert "\n" not in str(caught.value)


def test_large_models_keep_their_constants_beside_the_graph(case, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "EXTERNAL_BYTES", 10_000)
    exported = TARGET.export(case.model, case.weights, tmp_path, case.statistics)
    assert exported.weights == ("model.onnx", "model.onnx.data")
    with TARGET.reload(tmp_path) as runtime, TARGET.reload(case.folder) as other:
        assert runtime.differences(assignment_of(case.weights)) == []
        assert torch.equal(runtime.outputs(case.ids[0]), other.outputs(case.ids[0]))


def test_timing_says_what_was_timed(case):
    (measured,) = TARGET.time(case.model, case.weights, WORKLOAD)
    assert (measured.objective, measured.unit, measured.kind, measured.part) == (
        *("latency_prefill_ms", "ms", "measured", "report"),
    )
    assert measured.value > 0
    assert measured.n >= sessions.MIN_RUNS
    assert measured.detail["unquantized_ms"] > 0
    assert measured.detail["kernels"]["rtn-int4-g32"] == "nbits-int4-b32"
    assert (measured.detail["threads"], measured.detail["batch_size"], measured.detail["prompt_tokens"]) == (1, 2, 24)
    assert json.dumps(dict(measured.detail))
    with TARGET.reload(case.folder, threads=1) as runtime:
        (again,) = runtime.time(WORKLOAD)
    assert again.value > 0
    assert again.detail["threads"] == 1


def test_a_prompt_beyond_the_positions_is_refused(case):
    long = WORKLOAD.model_copy(update={"prompt_tokens": 65})
    for call in (lambda: TARGET.time(case.model, {}, long), lambda: TARGET.cost_table(case.model, {}, long)):
        with pytest.raises(SpecError, match="65 is too long for a model of 64 positions"):
            call()
    with TARGET.reload(case.folder) as runtime, pytest.raises(SpecError, match="65 is too long"):
        runtime.time(long)


def test_the_table_covers_every_choice(case, monkeypatch):
    monkeypatch.setattr(costs, "_RUNS", 8)
    model = case.model
    texts = {
        layer.name: [t for t in MIX if TARGET.refuses(layer, parse_scheme(t)) is None] for layer in model.info.layers
    }
    choices = {
        name: [
            plugins.load("methods", s.method, Method).quantize(model.weight(name), s) for s in map(parse_scheme, own)
        ]
        for name, own in texts.items()
    }
    table = TARGET.cost_table(model, choices, WORKLOAD)
    assert table.covers(texts, ["latency_prefill_ms"])
    json.dumps(asdict(table))
    kept = Assignment({layer.name: Keep() for layer in model.info.layers})
    assert table.predict("latency_prefill_ms", kept) == pytest.approx(
        table.detail["unquantized_ms"]["latency_prefill_ms"]
    )
    for layer in model.info.layers:
        entry = table.layer_ms["latency_prefill_ms"][layer.name]
        if layer.kind == "linear":
            assert entry["keep"] == entry["rtn-int8-channel-sym"]  # multiplied out before it runs
            assert all(ms > 0 for ms in entry.values())


def test_models_that_the_graph_cannot_stand_for(tiny, monkeypatch):
    with pytest.raises(ModelRefused, match=r"set model\.dtype: float32"):
        graphs.skeleton(tiny("bert", torch.bfloat16))

    model = tiny("bert", torch.float32)
    module = model.modules_of(next(layer for layer in model.info.layers if layer.kind == "linear"))[0]
    gated = type("Gated", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight)})
    monkeypatch.setattr(module, "__class__", gated)
    with pytest.raises(ModelRefused, match="a Gated does more than a plain linear map or lookup"):
        graphs.skeleton(model)


def test_runtime_names_its_version():
    name, version = TARGET.runtime().split()
    assert name == "onnxruntime"
    assert version[0].isdigit()
    assert TARGET.unavailable() is None


@pytest.mark.slow
@pytest.mark.untraced
def test_a_study_of_a_sentence_encoder(steady_costs, tmp_path):
    spec = build_spec(
        {
            "model": {"id": "demo:minilm", "dtype": "float32"},
            "data": {"calibration_tokens": 512, "search_tokens": 512, "report_tokens": 512, "window_tokens": 128},
            "target": {"name": "onnxruntime", "prompt_tokens": 32, "threads": 1},
            "space": {
                "schemes": ["keep", "rtn-int4-g32", "rtn-int8-channel-sym-a8dyn", "rtn-int8-channel-sym-a8mse"],
                "exclude": ["pooler.*"],
            },
            "objectives": ["cosine_distance", "size_bytes", "latency_prefill_ms"],
            "budget": {"trials": 8, "report_points": 1},
            "workers": {"cpus": 1},
        }
    )
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, spec)
    run_study(store, study.id)
    trials = store.trials(study.id, states=["complete"], with_assignments=True)
    unquantized = next(t for t in trials if t.baseline == "unquantized")
    timed = [t for t in trials if ("latency_prefill_ms", "report") in t.measurements]
    assert unquantized in timed
    # What the study promises is what the export is: bytes, formats, and hidden states.
    evaluator = Evaluator(spec)
    mixed = next(t for t in trials if t.baseline is None)
    for trial in (mixed, next(t for t in trials if t.baseline == "uniform-int4")):
        weights = {
            name: plugins.load("methods", s.method, Method).quantize(evaluator.model.weight(name), s)
            for name, s in trial.assignment.items()
        }
        folder = tmp_path / str(trial.number)
        folder.mkdir()
        exported = TARGET.export(evaluator.model, weights, folder, evaluator.statistics)
        size = sum((folder / name).stat().st_size for name in exported.weights)
        assert size == pytest.approx(trial.measurements["size_bytes", "search"].value, rel=0.005)
        with TARGET.reload(folder, threads=1) as runtime:
            assert runtime.differences(trial.assignment) == []
            comparison = evaluator.compare(trial.assignment, runtime.outputs, tokens=256)
        limit = comparison.moved if trial is mixed else TARGET.logits_tolerance
        assert comparison.apart < limit
