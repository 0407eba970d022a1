"""The evaluator on tiny models: what it measures equals a direct computation, however it remembers."""

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from autoq import plugins, reference
from autoq.assignment import Assignment
from autoq.calibration import curvature
from autoq.errors import AutoQError, ModelRefused, NotFinite
from autoq.evaluation import Evaluator
from autoq.methods import Method
from autoq.objectives import Objective, computed
from autoq.scheme import OBSERVERS, Keep, parse_scheme
from autoq.spec import build_spec
from autoq.statistics import Rival

DATA = {"calibration_tokens": 256, "search_tokens": 256, "report_tokens": 128, "window_tokens": 64}


@pytest.fixture
def make(tiny_model_dir, tmp_path, monkeypatch):
    """An evaluator of a tiny model of a family, with its own cache folder."""
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))

    def build(family="llama", objectives=("kl_nats_per_token", "perplexity", "size_bytes"), dtype="float32", **more):
        tree = {
            "model": {"id": str(tiny_model_dir(family)), "dtype": dtype},
            "data": DATA,
            "target": {"name": "generic"},
            "objectives": list(objectives),
        }
        return Evaluator(build_spec(tree | more))

    return build


def uniform(evaluator, text):
    scheme = parse_scheme(text)
    return Assignment(
        {layer.name: scheme if layer.kind in ("linear", "conv1d") else Keep() for layer in evaluator.info.layers}
    )


def by_name(measurements):
    return {m.objective: m for m in measurements}


def directly(evaluator, assignment, data):
    """KL and perplexity by the book, on weights set by hand."""
    with torch.no_grad():
        reference = torch.stack([evaluator.model.outputs(w.unsqueeze(0))[0] for w in data]).log_softmax(-1)
        weights = {
            name: evaluator.quantized(name, scheme).dequantize(evaluator.model.weight(name).dtype)
            for name, scheme in assignment.items()
        }
        evaluator.model.swap(weights)
        found = torch.stack([evaluator.model.outputs(w.unsqueeze(0))[0] for w in data]).log_softmax(-1)
        evaluator.model.restore()
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    nll = torch.nn.functional.nll_loss(found[:, :-1].flatten(0, 1), data[:, 1:].flatten())
    return float(kl), math.exp(nll)


def test_slopes_come_from_the_windows_of_their_turn(make, monkeypatch):
    """In turns through the search part; the loss there is that of these tokens, whatever the trial's whole value."""
    monkeypatch.setattr("autoq.evaluation.SLOPE_TOKENS", 2 * DATA["window_tokens"])
    evaluator = make()
    assignment = uniform(evaluator, "rtn-int3-g32")
    layer = next(layer.name for layer in evaluator.info.layers if layer.kind == "linear")
    choices = {layer: ["rtn-int3-g32", "rtn-int4-g32"]}
    found = [evaluator.measure_with_slopes(assignment, "search", choices, turn) for turn in range(3)]
    for turn, (measurements, slopes) in enumerate(found):
        values = by_name(measurements)["kl_nats_per_token"].per_token
        start = 2 * (turn % 2)
        assert slopes["loss"] == pytest.approx(np.nanmean(values[start : start + 2]), rel=1e-4)
        assert len(slopes["table"][layer]) == 2
    assert found[0][1] == found[2][1]
    assert found[0][1] != found[1][1]


def test_quality_equals_a_direct_computation(make):
    evaluator = make()
    assignment = uniform(evaluator, "rtn-int3-g32")
    found = by_name(evaluator.measure(assignment, "search"))
    kl, perplexity = directly(evaluator, assignment, evaluator.parts.search)
    assert found["kl_nats_per_token"].value == pytest.approx(kl, rel=0.02, abs=2e-6)
    assert found["perplexity"].value == pytest.approx(perplexity, rel=1e-4)
    assert found["kl_nats_per_token"].n == evaluator.parts.search.numel()
    assert found["perplexity"].n == evaluator.parts.search.numel() - len(evaluator.parts.search)
    assert 0 < found["kl_nats_per_token"].stderr < found["kl_nats_per_token"].value


def test_report_part_is_other_data(make):
    evaluator = make()
    assignment = uniform(evaluator, "rtn-int3-g32")
    search, report = (by_name(evaluator.measure(assignment, part)) for part in ("search", "report"))
    assert search["kl_nats_per_token"].value != report["kl_nats_per_token"].value
    assert report["kl_nats_per_token"].part == "report"
    # and coming back to the first part gives the first numbers again
    again = by_name(evaluator.measure(assignment, "search"))
    assert again["kl_nats_per_token"].value == search["kl_nats_per_token"].value


def test_the_unquantized_model_is_at_zero_and_weights_are_back_afterwards(make):
    evaluator = make()
    before = {layer.name: evaluator.model.weight(layer.name).clone() for layer in evaluator.info.layers}
    evaluator.measure(uniform(evaluator, "rtn-int2-g32"), "search")
    for layer in evaluator.info.layers:
        module = evaluator.model.modules_of(layer)[0]
        assert torch.equal(module.weight, before[layer.name])
    kl = by_name(evaluator.measure(Assignment({}), "search"))["kl_nats_per_token"].value
    assert abs(kl) < 1e-5


@pytest.mark.parametrize("memory", ["hidden states", "file"])
def test_little_memory_changes_how_the_reference_is_kept_and_nothing_else(make, memory, monkeypatch):
    plenty = make()
    assignment = uniform(plenty, "rtn-int3-g32")
    expected = by_name(plenty.measure(assignment, "search"))
    little = make(bank={"memory": "1KB"})
    if memory == "file":
        monkeypatch.setattr(reference, "_hidden_states", lambda *_: None)
    found = by_name(little.measure(assignment, "search"))
    kept = little._reference[-1]
    assert (kept.head_weight is not None) == (memory == "hidden states")
    assert (kept.kept.dtype == torch.bfloat16) == (memory == "file")
    for name, measurement in expected.items():
        assert found[name].value == pytest.approx(measurement.value, rel=0.02, abs=2e-6)


def test_quantizing_the_head_does_not_quantize_the_reference(make):
    """With hidden states as reference, its logits must come from the original head."""
    evaluator = make(bank={"memory": "1KB"})
    head = next(layer.name for layer in evaluator.info.layers if layer.kind == "head")
    kl = by_name(evaluator.measure(Assignment({head: parse_scheme("rtn-int2-channel")}), "search"))
    assert kl["kl_nats_per_token"].value > 1e-4


def test_nan_is_an_error_that_says_so(make):
    evaluator = make()
    name = next(layer.name for layer in evaluator.info.layers if layer.kind == "linear")
    scheme = parse_scheme("rtn-int8-channel")
    evaluator.bank.dequantized = lambda weight, *_: torch.full_like(weight, torch.nan)
    with pytest.raises(NotFinite, match="NaN or infinite"):
        evaluator.measure(Assignment({name: scheme}), "search")
    del evaluator.bank.dequantized
    assert by_name(evaluator.measure(Assignment({}), "search"))["perplexity"].value < 1e6


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "opt", "t5", "bart", "bert-mlm"])
def test_other_families_are_measured(make, family):
    evaluator = make(family, objectives=("kl_nats_per_token", "size_bytes"))
    found, kept = (
        by_name(evaluator.measure(assignment, "search"))["kl_nats_per_token"].value
        for assignment in (uniform(evaluator, "rtn-int2-channel"), Assignment({}))
    )
    assert found > 3 * abs(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_without_a_head_is_measured_by_its_embeddings(make, dtype):
    evaluator = make("bert", objectives=("cosine_distance", "size_bytes"), dtype=dtype)
    found = by_name(evaluator.measure(uniform(evaluator, "rtn-int2-channel"), "search"))["cosine_distance"]
    kept = by_name(evaluator.measure(Assignment({}), "search"))["cosine_distance"]
    assert found.value > 20 * abs(kept.value)
    names = [layer.name for layer in evaluator.info.layers if layer.kind == "linear"]
    table = evaluator.sensitivities({name: ["rtn-int2-channel", "rtn-int4-channel"] for name in names[:3]})
    assert all(row["rtn-int2-channel"] > row["rtn-int4-channel"] > 0 for row in table.values())


def test_computed_needs_no_model(make):
    evaluator = make()
    objectives = {name: plugins.load("objectives", name, Objective) for name in ("size_bytes", "bits_per_weight")}
    how = (evaluator.spec.target, evaluator.target)
    small = computed(objectives, evaluator.info, uniform(evaluator, "rtn-int4-g32"), None, *how)
    assert [m.kind for m in small] == ["computed", "computed"]
    large = computed(objectives, evaluator.info, Assignment({}), None, *how)
    assert small[0].value < large[0].value
    assert 4 < small[1].value < 6


def test_sensitivities_rank_what_the_forward_pass_measures(make):
    """The proxy orders single-layer perturbations nearly as their measured divergences."""
    from scipy.stats import spearmanr

    evaluator = make(objectives=("kl_nats_per_token",))
    schemes = ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32"]
    names = [layer.name for layer in evaluator.info.layers if layer.kind == "linear"]
    table = evaluator.sensitivities({name: [*schemes, "keep"] for name in names})
    assert all(table[name]["keep"] == 0 for name in names)
    assert all(table[name]["rtn-int2-g32"] > table[name]["rtn-int4-g32"] > 0 for name in names)
    pairs = [(name, text) for name in names for text in schemes]
    predicted = [table[name][text] for name, text in pairs]
    measured = [
        by_name(evaluator.measure(Assignment({name: parse_scheme(text)}), "search"))["kl_nats_per_token"].value
        for name, text in pairs
    ]
    assert spearmanr(predicted, measured).statistic > 0.85


def test_a_calibrated_range_is_predicted_by_what_it_does_to_inputs(make):
    evaluator = make(objectives=("kl_nats_per_token",), target={"name": "described", "device": "tpu-v4i"})
    names = [layer.name for layer in evaluator.info.layers if layer.kind == "linear"]
    texts = [f"rtn-int8-channel-sym{end}" for end in ("", *(f"-{name}" for name in OBSERVERS))]
    table = evaluator.sensitivities(dict.fromkeys(names, texts))
    weights = sum(table[name][texts[0]] for name in names)
    for text in texts[1:]:
        noise = curvature.static_noise(
            evaluator.statistics(names[0]), evaluator.activation(names[0], parse_scheme(text))
        )
        own = float(evaluator.statistics(names[0])["grad_square"] @ evaluator.model.weight(names[0]).square().sum(1))
        assert table[names[0]][text] - table[names[0]][texts[0]] == pytest.approx(noise * own / 2, rel=1e-3)
        predicted = sum(table[name][text] for name in names)
        assert predicted > 1.2 * weights
    assert len({tuple(table[name][text] for name in names) for text in texts}) == len(texts)


def test_calibration_is_done_once_per_model_and_data(make, monkeypatch):
    evaluator = make()
    first = evaluator.calibrate()

    def never(*_):
        raise AssertionError("gathered twice")

    monkeypatch.setattr("autoq.calibration.curvature.gather", never)
    assert make().calibrate() == first


def test_damaged_statistics_are_gathered_again(make):
    evaluator = make()
    path = Path(evaluator.calibrate())
    whole = load(path.read_bytes())  # not mapped: a mapped file that is cut short ends the process
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert evaluator.calibrate() == str(path)
    # Not byte by byte: the header's entries have no order of their own.
    again = load(path.read_bytes())
    assert again.keys() == whole.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_statistics_depend_on_what_is_no_layer(make):
    """Two models may share every layer's weight and still differ in a norm or in their config."""
    evaluator = make()
    files = {evaluator.calibrate()}
    evaluator.model.model.model.norm.weight.data.mul_(2)
    evaluator._path = None  # found once, as nothing else ever changes a model
    files.add(evaluator.calibrate())
    evaluator.model.model.config.rms_norm_eps *= 10
    evaluator._path = None
    files.add(evaluator.calibrate())
    assert len(files) == 3


def test_a_model_that_gives_nan_by_itself_is_refused_before_any_trial(make):
    evaluator = make(dtype="bfloat16")
    assert evaluator.describe()["window_tokens"] == 64
    evaluator.model.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelRefused, match=r"NaN or infinity before anything is quantized.*overflow in bfloat16$"):
        evaluator.describe()
    with pytest.raises(NotFinite, match="calibration data"):
        evaluator.calibrate()


@pytest.mark.parametrize(
    ("problem", "kind", "end"),
    [
        (NotFinite("the weight has NaN"), NotFinite, "the weight has NaN"),
        (ZeroDivisionError("by zero"), AutoQError, "ZeroDivisionError: by zero"),
        (AutoQError("the bank cannot write"), AutoQError, "the bank cannot write"),
    ],
)
def test_a_method_that_fails_is_told_with_its_layer_and_scheme(make, monkeypatch, problem, kind, end):
    evaluator = make()

    def fail(*_):
        raise problem

    monkeypatch.setattr(type(plugins.load("methods", "rtn", Method)), "quantize", fail)
    name = next(layer.name for layer in evaluator.info.layers if layer.kind == "linear")
    where = "" if str(problem) == end and kind is AutoQError else f"layer {name} as rtn-int4-g32: "
    for act in (
        lambda: evaluator.sensitivities({name: ["rtn-int4-g32"]}),
        lambda: evaluator.measure(Assignment({name: parse_scheme("rtn-int4-g32")}), "search"),
    ):
        with pytest.raises(AutoQError) as caught:
            act()
        assert (type(caught.value), str(caught.value)) == (kind, where + end)


def test_a_predicted_loss_that_overflows_names_the_layer(make):
    evaluator = make()
    name = next(layer.name for layer in evaluator.info.layers if layer.kind == "linear")
    evaluator.calibrate()
    evaluator.model.weight(name).mul_(1e38)
    with pytest.raises(NotFinite, match=rf"^layer {name} as rtn-int2-g32: its predicted loss is (inf|nan); exclude"):
        evaluator.sensitivities({name: ["rtn-int2-g32"]})


def rival_of(evaluator, assignment, confidence=0.99):
    found = evaluator.measure(assignment, "search")
    return Rival(3, {m.objective: m.per_token for m in found}, confidence)


def test_values_per_token_are_those_whose_mean_is_the_measurement(make):
    evaluator = make()
    found = by_name(evaluator.measure(uniform(evaluator, "rtn-int3-g32"), "search"))
    kl, perplexity = found["kl_nats_per_token"], found["perplexity"]
    assert kl.per_token.shape == perplexity.per_token.shape == evaluator.parts.search.shape
    assert kl.per_token.mean(dtype=float) == pytest.approx(kl.value, rel=1e-12)
    assert math.isnan(perplexity.per_token[0, -1])
    assert math.exp(np.nanmean(perplexity.per_token, dtype=float)) == pytest.approx(perplexity.value, rel=1e-12)


LONGER = {**DATA, "search_tokens": 2048, "window_tokens": 64}


def test_a_candidate_is_given_up_where_its_rival_is_better_in_all_qualities(make):
    evaluator = make(data=LONGER)
    good, bad = (uniform(evaluator, text) for text in ("rtn-int8-channel", "rtn-int2-channel"))
    whole = by_name(evaluator.measure(bad, "search"))
    rival = rival_of(evaluator, good)
    both = Rival(
        3, {**rival.values, "perplexity": by_name(evaluator.measure(bad, "search"))["perplexity"].per_token}, 0.99
    )
    kl = Rival(3, {"kl_nats_per_token": rival.values["kl_nats_per_token"]}, 0.99)
    found = by_name(evaluator.measure(bad, "search", kl))
    stopped, other = found["kl_nats_per_token"], found["perplexity"]
    assert (stopped.n, stopped.detail["of"], stopped.detail["rival"]) == (512, 2048, 3)
    assert np.array_equal(stopped.per_token[:8], whole["kl_nats_per_token"].per_token[:8])
    assert np.isnan(stopped.per_token[8:]).all()
    losses = kl.values["kl_nats_per_token"].astype(float)
    expected = losses.mean() * stopped.per_token[:8].mean(dtype=float) / losses[:8].mean()
    assert stopped.detail["estimate"] == pytest.approx(expected, rel=1e-9)
    assert other.detail["estimate"] == pytest.approx(other.value), "nothing is known of a rival's"
    assert stopped.detail["forward_passes"] <= 512 / 2048
    # In perplexity it is as good as this rival: worse in one quality is not worse in all.
    assert "rival" not in evaluator.measure(bad, "search", both)[0].detail
    assert by_name(evaluator.measure(good, "search", kl))["kl_nats_per_token"].n == 2048
    other_text = Rival(3, {"kl_nats_per_token": kl.values["kl_nats_per_token"][:, :32]}, 0.99)
    assert by_name(evaluator.measure(bad, "search", other_text))["kl_nats_per_token"].n == 2048


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert-mlm", "t5"])
def test_reuse_changes_no_bit_of_what_is_measured(make, family):
    """One evaluator remembers, the other has no memory for it."""
    objectives = ("kl_nats_per_token", "size_bytes")
    reusing, forgetful = make(family, objectives), make(family, objectives, bank={"memory": 1000})
    monitored = forgetful._reference_for("search", forgetful.parts.search)
    reusing._reference = ("search", len(forgetful.parts.search), monitored)
    rng = random.Random(0)
    names = [layer.name for layer in reusing.info.layers if layer.kind in ("linear", "conv1d", "head")]
    late = [layer.name for layer in reusing.info.layers if layer.block == 1]
    chosen, passes = {}, []
    for some in (names, names, late, names, late):
        for name in rng.sample(some, 2):
            chosen[name] = parse_scheme(rng.choice(["rtn-int2-channel", "rtn-int8-channel-sym-a8dyn", "keep"]))
        (found,), (expected,) = (e.measure(Assignment(chosen), "search") for e in (reusing, forgetful))
        assert found.value.hex() == expected.value.hex()
        assert np.array_equal(found.per_token, expected.per_token)
        passes.append(found.detail["forward_passes"])
        assert expected.detail["forward_passes"] == 1
    assert passes[0] == 1
    assert (min(passes) < 1) == (family != "t5")


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_probe_is_the_loss_of_one_layer_alone(make, family):
    evaluator = make(family, objectives=("cosine_distance" if family == "bert" else "kl_nats_per_token",))
    linear = [layer.name for layer in evaluator.info.layers if layer.block is not None]
    perturbed = [(linear[0], "rtn-int2-channel"), (linear[-1], "rtn-int2-channel"), (linear[-1], "keep")]
    probes = evaluator.probe(perturbed, 150)
    evaluator.parts = dataclasses.replace(evaluator.parts, search=evaluator.parts.calibration[:2])
    evaluator._reference = None
    for (name, text), probe in zip(perturbed, probes, strict=True):
        (found,) = evaluator.measure(Assignment({name: parse_scheme(text)}), "search")
        assert (probe.loss, probe.stderr, probe.tokens) == (found.value, found.stderr, 128)
    assert len({probe.loss for probe in probes}) == 3
    if family != "t5":
        # The first of them pays for the unquantized model's states, which the others take.
        assert probes[0].forward_passes == 2
        assert probes[1].forward_passes < 1
