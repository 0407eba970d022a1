"""Devices that are described: what a description must say, what runs, and rooflines computed by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import FP8, SYMMETRIC_INT8, input_range
from autoq.energy import work
from autoq.errors import SchemeRefused, SpecError
from autoq.layer import Layer, ModelInfo
from autoq.objectives import Objective, computed
from autoq.scheme import OBSERVERS, Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import TargetSpec, build_spec
from autoq.store import Store
from autoq.targets import Target, load_target
from autoq.targets._described_device import ASSUMPTION, load_device, parse_device, shipped

DESCRIPTION = """
name: toy
summary: numbers that can be computed by hand
sources: {note: a data sheet that does not exist}
arithmetic:
  int8: {operations_per_second: {value: 4e9, source: note}, picojoule_per_operation: {value: 1, source: note}}
  bf16: {operations_per_second: {value: 1e9, source: note}, picojoule_per_operation: {value: 4, source: note}}
memory:
  bandwidth_bytes_per_second: {value: 1e9, source: note}
  capacity_bytes: {value: 100KB, source: note}
  picojoule_per_byte: {value: 100, source: note}
launch: {seconds: {value: 1e-6, source: "assumption: a guess"}, others_per_block: {value: 3, source: note}}
idle_watt: {value: 2, source: note}
kernels:
  - {weights: int4, group_sizes: [32, 64], zero_points: [none, integer], in_multiple: 32, out_multiple: 4}
  - {weights: int8, activations: [a8dyn, a8static], computes: int8}
  - {weights: int8, layers: [linear, head, embedding]}
  - {weights: mxfp4}
"""
LAYER = Layer("model.layers.0.mlp.up_proj", "linear", 96, 64, 2, block=0)
WORKLOAD = TargetSpec(name="described", device="toy", batch_size=2, prompt_tokens=8)
INFO = ModelInfo(
    "LlamaForCausalLM",
    "causal",
    "bfloat16",
    50,
    64,
    (
        *(Layer(f"model.layers.0.self_attn.{n}_proj", "linear", 64, 64, 2, block=0) for n in "qkvo"),
        LAYER,
        Layer("lm_head", "head", 50, 64, 2, tied=("model.embed_tokens",)),
    ),
    other_bytes=256,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(DESCRIPTION)
    return path


@pytest.fixture
def target(file):
    return load_target(TargetSpec(name="described", device=str(file)))


class TestDescription:
    @pytest.mark.parametrize("name", shipped())
    def test_shipped_ones_are_whole_and_every_figure_is_cited(self, name):
        device = load_device(name)
        assert device.name == name
        assert load_target(TargetSpec(name="described", device=name)).device == device
        cited = {q.source for own in device.arithmetic.values() for q in (own.operations_per_second,)}
        assert any(not source.startswith(ASSUMPTION) for source in cited)

    def test_there_is_one_of_each_kind(self):
        assert set(shipped()) == {"edge-npu", "fpga-u280", "tpu-v4i"}

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ("name: toy\n", "", "name: is required"),
            ("value: 4e9", "value: fast", "arithmetic.int8.operations_per_second.value: must be"),
            ("value: 4e9", "value: 0", "must be more than 0"),
            ("100KB", "100 KByte", "memory.capacity_bytes.value: must be a size such as 120MB"),
            ("source: note}, picojoule", "source: notes}, picojoule", "'notes' is not one of the sources note, nor"),
            ('"assumption: a guess"', '"assumption: "', "launch.seconds.source"),
            ("weights: int4", "weights: int44", "did you mean 'int4'"),
            ("in_multiple: 32", "in_multipl: 32", "did you mean 'in_multiple'"),
            ("group_sizes: [32, 64]", "group_sizes: [1]", "2 to 65536"),
            ("computes: int8}", "computes: fp8}", "no arithmetic for fp8; there is int8, bf16"),
            (", computes: int8}", "}", "need computes"),
            ("{weights: mxfp4}", "{weights: mxfp4, computes: int8}", "computes is for quantized activations"),
            ("{weights: mxfp4}", "{weights: int8, layers: [head]}", "two kernels take weights int8"),
            ("{weights: mxfp4}", "{weights: nvfp4, activations: [a8dyn], computes: int8}", "no scheme with quantized"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named_in_one_line(self, before, after, message):
        assert DESCRIPTION.count(before) >= 1
        with pytest.raises(SpecError, match=r"^here: ") as caught:
            parse_device(DESCRIPTION.replace(before, after, 1), "here")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unknown_devices_are_named_with_the_choices(self, tmp_path):
        with pytest.raises(SpecError, match=r"'edge-npv'.* did you mean 'edge-npu'\?; shipped are edge-npu, fpga-u280"):
            load_device("edge-npv")
        with pytest.raises(SpecError, match="no file"):
            load_device(str(tmp_path))
        with pytest.raises(SpecError, match="anchors"):
            parse_device("name: &a toy")
        with pytest.raises(SpecError, match="must be a mapping"):
            parse_device("- toy")

    def test_a_spec_must_name_the_device_and_others_must_not(self):
        with pytest.raises(SpecError, match=r"target\.device: described needs .* edge-npu"):
            load_target(TargetSpec(name="described"))
        with pytest.raises(SpecError, match=r"target\.device: generic is a runtime"):
            load_target(TargetSpec(name="generic", device="edge-npu"))

    def test_numbers_of_two_versions_never_meet(self, target):
        other = parse_device(DESCRIPTION.replace("value: 2,", "value: 3,"))
        assert other.digest != target.device.digest
        assert target.device.digest in target.title


class TestRules:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("rtn-int4-g32", None),
            ("rtn-int4-g64-sym", None),
            ("keep", None),
            ("rtn-int8-channel-sym-a8dyn", None),
            ("rtn-mxfp4-g32", None),
            ("rtn-int3-g32", "toy runs weights in int4, int8, mxfp4, not int3"),
            ("rtn-int4-g128", "toy runs int4 weights by group size 32, 64, not 128"),
            ("hqq-int4-g32-rz", "toy runs int4 weights with zero points none, integer, not real"),
            ("rtn-int4-g32-a8dyn", "toy runs int4 weights with activations none, not a8dyn"),
            ("kmeans4-channel", "toy runs weights in int4, int8, mxfp4, not codebook4"),
            ("gguf-q4_0", "a GGUF type belongs to the target llama-cpp"),
        ],
    )
    def test_what_the_kernels_take_runs(self, target, text, reason):
        assert target.refuses(LAYER, parse_scheme(text)) == reason

    def test_shapes_and_places_are_looked_at(self, target):
        int4, a8 = parse_scheme("rtn-int4-g32"), parse_scheme("rtn-int8-channel-sym-a8dyn")
        narrow = dataclasses.replace(LAYER, in_features=48)
        assert target.refuses(narrow, int4) == "group size 32 does not divide the 48 inputs of shape (96, 48)"
        odd = dataclasses.replace(LAYER, out_features=95)
        assert target.refuses(odd, int4) == "toy needs outputs in multiples of 4, and the layer has shape (95, 64)"
        tied = INFO.layers[-1]
        assert target.refuses(tied, parse_scheme("rtn-int8-channel-sym")) is None
        assert "no int8 kernel with activations a8dyn for embedding and head" in target.refuses(tied, a8)

    def test_the_space_holds_what_the_kernels_take(self, target):
        grid = target.grid()
        assert (grid.bits, grid.zero_points, grid.activations) == ((4, 8), ("none", "integer"), (None, "a8dyn"))
        assert grid.formats == ("mxfp4",)
        assert list(target.baselines()) == ["unquantized", "uniform-int4", "uniform-int8-a8dyn", "uniform-int8"]

    def test_models_that_cannot_be_computed_are_refused(self, target):
        assert target.refuses_model(INFO) is None
        half = dataclasses.replace(INFO, dtype="float16")
        assert target.refuses_model(half) == "toy does not compute in float16; choose model.dtype from bfloat16"
        assert "experts" in target.refuses_model(dataclasses.replace(INFO, other_bytes=10**9))


class TestRoofline:
    def table(self, target, *texts):
        return target.predicted_costs(INFO, {LAYER.name: ["keep", *texts]}, WORKLOAD)

    def test_a_layer_takes_the_longer_of_arithmetic_and_memory(self, target):
        table = self.table(target, "rtn-int4-g32-sym", "rtn-int8-channel-sym-a8dyn")
        decode, prefill = (table.layer_ms[p][LAYER.name] for p in (work.DECODE, work.PREFILL))
        activations = 2 * (96 + 64) * 2  # two rows in and out, bfloat16
        # decoding: 24,576 operations in bfloat16 at 1e9/s are 24.6 µs; 12,928 bytes are 12.9 µs
        assert decode["keep"] == pytest.approx(1e3 * (2 * 2 * 96 * 64 / 1e9 + 1e-6))
        assert decode["rtn-int4-g32-sym"] == decode["keep"]
        # in int8 the arithmetic is four times faster, and the memory is what is waited for
        int8 = 96 * 64 + 96 * 2 + activations
        assert decode["rtn-int8-channel-sym-a8dyn"] == pytest.approx(1e3 * (int8 / 1e9 + 1e-6))
        assert prefill["rtn-int8-channel-sym-a8dyn"] == pytest.approx(1e3 * (2 * 16 * 96 * 64 / 4e9 + 1e-6))

    def test_the_base_holds_attention_its_cache_and_all_that_is_not_searched(self, target):
        table = self.table(target)
        attention = (work.attention_modules(INFO))[0]
        other = work.attention_work(INFO, attention, work.DECODE, WORKLOAD) + work.Work(0, 256)
        base = max(other.operations / 1e9, other.moved / 1e9) + 3 * 1e-6
        for layer in INFO.layers:
            if layer is not LAYER:
                share = work.layer_work(INFO, layer, Keep(), work.DECODE, WORKLOAD)
                base += max(share.operations, share.moved) / 1e9 + 1e-6
        assert table.base_ms[work.DECODE] == pytest.approx(1e3 * base)
        kept = Assignment({LAYER.name: Keep()})
        assert table.detail["unquantized_ms"][work.DECODE] == pytest.approx(table.predict(work.DECODE, kept))

    def test_what_does_not_fit_is_refused(self, target):
        long = TargetSpec(name="described", device="toy", batch_size=4, prompt_tokens=64)
        with pytest.raises(SpecError, match=r"100000 bytes of memory.*4 × 64 tokens needs"):
            target.predicted_costs(INFO, {}, long)
        with pytest.raises(SpecError, match="prompt_tokens: 65 is too long"):
            target.predicted_costs(INFO, {}, TargetSpec(name="described", device="toy", prompt_tokens=65))

    def test_energy_is_operations_bytes_and_idle_power(self, target):
        energy = plugins.load("objectives", "energy_joule_per_token", Objective)
        kept, a8 = (
            energy.estimate(INFO, Assignment({LAYER.name: parse_scheme(text)}), WORKLOAD, target)
            for text in ("keep", "rtn-int8-channel-sym-a8dyn")
        )
        operations = 2 * 2 * 96 * 64
        saved_bytes = 96 * 64 * 2 - (96 * 64 + 96 * 2)
        parts = [name for name in kept.detail if name.endswith("_joule")]
        change = {name: (kept.detail[name] - a8.detail[name]) * 2 for name in parts}  # two tokens
        assert change["operations_joule"] == pytest.approx(operations * (4 - 1) * 1e-12)
        assert change["memory_joule"] == pytest.approx(saved_bytes * 100e-12)
        table = self.table(target, "rtn-int8-channel-sym-a8dyn").layer_ms[work.DECODE][LAYER.name]
        assert change["idle_joule"] == pytest.approx(2 * (table["keep"] - table["rtn-int8-channel-sym-a8dyn"]) / 1e3)

    def test_measurements_say_what_they_are(self, target):
        names = ("latency_decode_ms", "energy_joule_per_token")
        objectives = {name: plugins.load("objectives", name, Objective) for name in names}
        table = self.table(target)
        latency, energy = computed(objectives, INFO, Assignment({LAYER.name: Keep()}), table, WORKLOAD, target)
        assert (latency.kind, energy.kind, energy.unit) == ("predicted", "computed", "J")
        assert latency.device == energy.device == target.title


def statistics_of(x):
    counts = Histogram()
    counts.add(x)
    return {
        "input_range": torch.stack([x.min(), x.max()]),
        "input_counts": counts.sums,
        "input_exponent": torch.tensor([counts.exponent]),
    }


class TestActivation:
    def test_dynamic_rounding_is_per_token(self, target):
        function = target.activation(parse_scheme("rtn-int8-channel-sym-a8dyn"))
        x = torch.tensor([[1.27, -0.014, 0.026], [0.0, 0.0, 0.0], [127.0, 0.5, 1.5]])
        expected = torch.tensor([[1.27, -0.01, 0.03], [0.0, 0.0, 0.0], [127.0, 0.0, 2.0]])
        torch.testing.assert_close(function(x), expected)
        assert function(x.bfloat16()).dtype == torch.bfloat16

    def test_static_rounding_is_by_the_calibrated_range(self, target):
        scheme = parse_scheme("rtn-int8-channel-sym-a8static")
        function = target.activation(scheme, {"input_range": torch.tensor([-2.54, 1.0])})
        torch.testing.assert_close(function(torch.tensor([[0.021, 9.0]])), torch.tensor([[0.02, 2.54]]))
        with pytest.raises(SchemeRefused, match="its inputs have no range; choose a8dyn"):
            target.activation(scheme)

    def test_one_kernel_takes_the_range_of_any_observer(self, target):
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
        statistics = statistics_of(x)
        largest = {}
        for name in OBSERVERS:
            scheme = parse_scheme(f"rtn-int8-channel-sym-{name}")
            assert target.refuses(LAYER, scheme) is None
            largest[name] = float(target.activation(scheme, statistics)(x).abs().max())
            expected = input_range(scheme, statistics, SYMMETRIC_INT8).abs().max()
            assert largest[name] == pytest.approx(float(expected))
        assert len(set(largest.values())) == len(OBSERVERS)
        assert max(largest, key=largest.get) == "a8static"

    def test_fp8_keeps_three_bits_of_mantissa(self):
        device = plugins.load("targets", "described", Target)
        function = device.activation(parse_scheme("rtn-fp8-channel-a8dyn"))
        torch.testing.assert_close(function(torch.tensor([[448.0, 17.0, 0.3]])), torch.tensor([[448.0, 16.0, 0.3125]]))

    def test_dynamic_fp8_is_per_token(self):
        device = plugins.load("targets", "described", Target)
        assert device.rounds_per_token
        function = device.activation(parse_scheme("rtn-fp8-channel-a8dyn"))
        small, large = torch.tensor([[4.48e-4, 3e-7]]), torch.tensor([[448.0, 17.0]])
        torch.testing.assert_close(function(torch.cat([small, large])), torch.cat([function(small), function(large)]))
        assert float(function(torch.cat([small, large]))[0, 1]) == pytest.approx(3e-7, rel=1 / 16)

    def test_static_fp8_takes_the_range_of_any_observer(self):
        device = plugins.load("targets", "described", Target)
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
        statistics = statistics_of(x)
        for name in OBSERVERS:
            scheme = parse_scheme(f"rtn-fp8-channel-{name}")
            largest = float(input_range(scheme, statistics, FP8).abs().max())
            rounded = device.activation(scheme, statistics)(x)
            assert float(rounded.abs().max()) == pytest.approx(largest)
            inside = (x.abs() < largest) & (x.abs() > largest / 2**14)
            assert float(((rounded - x) / x)[inside].abs().max()) <= 1 / 15.9

    def test_weight_only_schemes_leave_inputs_alone(self, target):
        assert target.activation(parse_scheme("rtn-int4-g32")) is None


def test_a_study_predicts_and_times_nothing(tiny_model_dir, file, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    file.write_text(DESCRIPTION.replace("100KB", "100MB"))
    objectives = ["kl_nats_per_token", "latency_decode_ms", "energy_joule_per_token"]
    spec = build_spec(
        {
            "model": {"id": str(tiny_model_dir("llama"))},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "target": {"name": "described", "device": str(file), "prompt_tokens": 16},
            "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym-a8dyn", "keep"]},
            "objectives": objectives,
            "budget": {"trials": 8, "report_points": 2},
            "workers": {"cpus": 1},
        }
    )
    with Store.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        study = create_study(store, spec)
        run_study(store, study.id)
        trials = store.trials(study.id, states=["complete"])
        assert len(trials) == 8
        for trial in trials:
            kinds = {name: m.kind for (name, part), m in trial.measurements.items() if part == "search"}
            assert kinds == dict(zip(objectives, ["measured", "predicted", "computed"], strict=True))
            assert {name for name, part in trial.measurements if part == "report"} <= {"kl_nats_per_token"}
        named = {trial.baseline: trial for trial in trials if trial.baseline}
        kept, int8 = (
            named[name].measurements["energy_joule_per_token", "search"]
            for name in ("unquantized", "uniform-int8-a8dyn")
        )
        assert int8.value < kept.value
        assert kept.device.startswith("toy as described")
