"""The curvature proxy against what it approximates."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoq.calibration import curvature
from autoq.calibration.curvature import bound, dynamic_noise, gather, is_whole, proxy, save, static_noise
from autoq.calibration.histogram import Histogram
from autoq.errors import AutoQError, NotFinite
from autoq.models.loading import load
from autoq.scheme import parse_scheme
from autoq.spec import ModelSpec

INT8, FP8 = parse_scheme("rtn-int8-channel-sym-a8dyn"), parse_scheme("rtn-fp8-channel-a8dyn")
WINDOWS = torch.arange(24).view(2, 12)  # each token another row of inputs


class Toy:
    """One layer between given inputs and a head; it records each position's input and gradient.

    Early positions have large inputs and small gradients, as an attention sink has.
    """

    device = torch.device("cpu")

    def __init__(self, columns, outputs, task="causal", runs=1, gate=1.0):
        generator = torch.Generator().manual_seed(0)
        self.size = torch.logspace(2, -1, 12).repeat(2).unsqueeze(1)  # (24, 1)
        self.x = torch.randn(24, columns, generator=generator) * self.size
        self.head = torch.randn(7, outputs, generator=generator)
        self.layer, self.runs, self.gate = nn.Linear(columns, outputs).requires_grad_(False), runs, gate
        self.layer.weight.copy_(torch.randn(outputs, columns, generator=generator))
        self.layer.bias.copy_(torch.randn(outputs, generator=generator) / columns**0.5)
        self.info = SimpleNamespace(task=task, layers=[SimpleNamespace(name="layer", stack=None)])
        self.inputs, self.gradients = [], []

    def modules_of(self, _):
        return [self.layer]

    def positions(self, tokens):
        return tokens

    def length(self, data):
        return data.shape[1]

    def tokens(self, data):
        return data.numel()

    def outputs(self, ids):
        hidden = 0
        for run in range(self.runs):
            x = self.x[ids] * (run + 1)
            y = self.layer(x)
            self.inputs.append(x[0])
            if y.requires_grad:
                y.register_hook(lambda grad: self.gradients.insert(0, grad[0]))
            hidden = hidden + y
        return self.gate * (hidden / self.size[ids]).tanh() @ self.head.t()

    def seen(self):
        """Inputs and gradients (positions, …): a backward pass goes from the last run to the first."""
        windows = [self.gradients[index : index + self.runs] for index in range(0, len(self.gradients), self.runs)]
        return torch.cat(self.inputs), torch.cat([run for window in windows[::-1] for run in window])


def by_sequence(x, g, delta):
    """½ E[⟨G, ΔW⟩²] / T: the Fisher matrix, of uses of 12 positions each."""
    whole = (g * (x @ delta.t())).sum(1).view(-1, 12).sum(1)
    return 0.5 * float(whole.square().sum()) / WINDOWS.numel()


@pytest.mark.parametrize("columns", [5, 40])  # fewer and more than tokens
@pytest.mark.parametrize(("task", "runs"), [("causal", 1), ("causal", 2), ("encoder", 1)])
def test_a_layer_of_one_output_costs_what_the_fisher_matrix_says(columns, task, runs):
    """With one output the Kronecker product is the whole matrix. A layer that runs twice in a pass pays for both."""
    toy = Toy(columns, 1, task, runs)
    found = gather(toy, WINDOWS, 0)["layer"]
    assert "inputs" in found  # two rows in all
    delta = torch.randn(1, columns, generator=torch.Generator().manual_seed(1))
    weight = toy.layer.weight
    assert proxy(found, weight, weight + delta) == pytest.approx(by_sequence(*toy.seen(), delta), rel=1e-4)


@pytest.mark.parametrize("outputs", [8, 30])  # fewer and more than a window's tokens
def test_factors_are_those_of_the_gradients_of_the_weight(outputs):
    """However they are stored: gradients have few rows or many."""
    for columns in (5, 40):
        toy = Toy(columns, outputs)
        found = gather(toy, WINDOWS, 0)["layer"]
        x, g = (each.view(2, 12, -1) for each in toy.seen())
        whole = g.transpose(1, 2) @ x
        assert torch.allclose(found["output_square"], whole.square().sum((0, 2)) / 24, rtol=1e-4)
        assert ("input_square" in found) == (columns == 5)
        square = found["input_square"] if columns == 5 else found["inputs"].t() @ found["inputs"] / len(found["inputs"])
        expected = (whole.transpose(1, 2) @ whole).sum(0) / whole.square().sum()
        assert torch.allclose(square, expected, atol=1e-5 * float(expected.abs().max()))


def test_an_error_that_is_alike_at_all_positions_adds_up():
    """Inputs that are the same everywhere: what positions cost one by one is a small part of it."""
    toy = Toy(5, 8)
    toy.x = toy.x[:1].expand(24, 5).contiguous()
    toy.size = torch.ones(24, 1)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    alone = {"output_square": g.square().mean(0), "input_square": x.t() @ x / len(x)}
    weight, deltas = toy.layer.weight, torch.randn(40, 8, 5, generator=torch.Generator().manual_seed(1))
    exact = sum(by_sequence(x, g, delta) for delta in deltas)
    told, by_position = (sum(proxy(s, weight, weight + delta) for delta in deltas) for s in (found, alone))
    assert abs(math.log(told / exact)) < 0.3
    assert abs(math.log(by_position / exact)) > 1.0


def test_inputs_that_nothing_depends_on_count_little():
    """K-FAC takes inputs and gradients as independent, and is far off where they are not."""
    toy = Toy(5, 8)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    independent = {"output_square": g.square().mean(0), "input_square": x.t() @ x / len(x)}
    weight, deltas = toy.layer.weight, torch.randn(40, 8, 5, generator=torch.Generator().manual_seed(1))
    exact = sum(by_sequence(x, g, delta) for delta in deltas)
    assert torch.allclose(found["grad_square"], independent["output_square"])
    assert abs(math.log(sum(proxy(found, weight, weight + delta) for delta in deltas) / exact)) < 0.3
    assert sum(proxy(independent, weight, weight + delta) for delta in deltas) > 10 * exact


def test_what_is_not_weighted_and_how_steps_are():
    toy = Toy(5, 8)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    assert torch.allclose(found["input_mean_square"], x.square().mean(0))
    assert found["input_range"].tolist() == [float(x.min()), float(x.max())]
    saliency = g.square().sum(1).view(2, 12).sum(1)
    steps = torch.stack([window.max() - window.min() for window in x.view(2, 12, 5)]) / 255
    assert float(found["step_square"]) == pytest.approx(float(saliency @ steps.square() / saliency.sum()))
    assert dynamic_noise(found, INT8, False) == float(found["step_square"]) / 12
    steps = x.abs().amax(1) / 127
    own = g.square().sum(1)
    exact = float(own @ steps.square() / own.sum()) / 12
    assert dynamic_noise(found, INT8, True) == pytest.approx(exact)


def test_gradients_come_of_the_first_windows_and_inputs_of_all(monkeypatch):
    monkeypatch.setattr(curvature, "GRADIENT_TOKENS", 13)
    toy = Toy(5, 8)
    found = gather(toy, WINDOWS, 0)["layer"]
    monkeypatch.undo()
    whole, first = gather(Toy(5, 8), WINDOWS, 0)["layer"], gather(Toy(5, 8), WINDOWS[:1], 0)["layer"]
    for name in ("input_mean_square", "hessian", "input_range", "input_peak", "input_counts", "input_exponent"):
        assert torch.equal(found[name], whole[name]), name
    for name in ("output_square", "input_square", "grad_square", "step_square", "token_step_square"):
        assert torch.equal(found[name], first[name]), name
    assert found["input_saliency"].sum() == pytest.approx(float(first["input_saliency"].sum()))


def test_of_a_mixture_all_windows_go_backward(monkeypatch):
    monkeypatch.setattr(curvature, "GRADIENT_TOKENS", 13)
    toy = Toy(5, 8)
    toy.info.layers[0].stack = "experts"
    gather(toy, WINDOWS, 0)
    assert len(toy.gradients) == 2


def test_noise_of_floats_hardly_depends_on_whose_range_it_is():
    toy = Toy(40, 8)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    step = x.abs().amax(1, keepdim=True) / 448
    rounded = (x / step).to(torch.float8_e4m3fn).float() * step
    saliency = g.square().sum(1, keepdim=True)
    exact = float((saliency * (rounded - x).square()).sum() / saliency.sum() / 40)
    assert dynamic_noise(found, FP8, True) == pytest.approx(exact, rel=0.3)


def test_the_histogram_is_that_of_all_inputs_and_the_other_weighs_them_by_their_gradients():
    toy = Toy(5, 8, runs=2)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    whole, weighted = Histogram(), Histogram()
    whole.add(x)
    weighted.add(x, g.square().sum(1, keepdim=True).expand_as(x))
    assert found["input_exponent"].tolist() == [whole.exponent]
    assert torch.equal(found["input_counts"], whole.sums)
    assert torch.allclose(found["input_saliency"], weighted.sums.float(), rtol=1e-4)


def test_noise_of_a_calibrated_rounding_is_what_it_does_where_gradients_are():
    """The early positions' huge inputs are cut off, and hardly count."""
    toy = Toy(5, 8)
    found = gather(toy, WINDOWS, 0)["layer"]
    x, g = toy.seen()
    saliency = g.square().sum(1, keepdim=True)
    for step in (0.5, 3.0, 30.0):

        def rounded(values, step=step):
            return (values / step).round().clamp(-8, 8) * step

        exact = float((saliency * (rounded(x) - x).square()).sum() / saliency.sum() / 5)
        plain = float((rounded(x) - x).square().mean())
        assert static_noise(found, rounded) == pytest.approx(exact, rel=0.1)
        assert abs(math.log(plain / exact)) > 0.5
    assert static_noise(found, lambda values: values) == 0


def test_a_layer_without_gradients_has_no_noise():
    assert dynamic_noise({}, INT8, True) == dynamic_noise({}, FP8, True) == static_noise({}, torch.zeros_like) == 0


def test_inputs_that_are_not_finite_are_refused_by_the_layers_name():
    toy = Toy(5, 8)
    toy.x[20, 3] = math.nan
    with pytest.raises(NotFinite, match="layer layer: its inputs are NaN or infinite"):
        gather(toy, WINDOWS, 0)


def test_a_layer_that_moves_nothing_costs_nothing():
    for columns in (5, 40):
        toy = Toy(columns, 8, gate=0.0)
        found = gather(toy, WINDOWS, 0)["layer"]
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert proxy(found, toy.layer.weight, toy.layer.weight + 1, dynamic_noise(found, INT8, True)) == 0


@pytest.mark.parametrize(("family", "name"), [("opt", "decoder.embed_positions"), ("bart", "encoder.embed_positions")])
def test_positions_are_looked_up_inside_their_table(tiny_model_dir, family, name):
    """These families' tables of positions are given something else than the rows, and skip the first two."""
    model = load(ModelSpec(id=str(tiny_model_dir(family)), dtype="float32"))
    found = gather(model, WINDOWS + 4, 0)[f"model.{name}"]
    frequency = found["row_frequency"]
    assert (frequency[2:14] > 0).all()
    assert float(frequency[2:14].sum()) == pytest.approx(1)
    assert float(frequency.sum()) == pytest.approx(1)


def test_linear_layer_by_hand():
    """½ Σ_i A_i (ΔW H ΔWᵀ)_ii on a 2×2 layer."""
    statistics = {
        "output_square": torch.tensor([1.0, 4.0]),
        "grad_square": torch.tensor([2.0, 3.0]),
        "input_square": torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        "step_square": torch.tensor([1.2]),
    }
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    dequantized = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    # rows of ΔW: (1, 0) -> 2; (1, -1) -> 2 - 2 + 3 = 3
    assert proxy(statistics, weight, dequantized) == pytest.approx(0.5 * (1 * 2 + 4 * 3))
    # noise of the input: rows of W squared are 1 and 4, times 1.2 / 12
    assert proxy(statistics, weight, dequantized, dynamic_noise(statistics, INT8, False)) == pytest.approx(
        7.0 + 0.5 * 0.1 * (2 * 1 + 3 * 4)
    )


def test_inputs_and_their_second_moment_say_the_same():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    dequantized = weight + 0.1 * torch.randn(3, 5)
    square = torch.rand(3)
    a = proxy({"output_square": square, "inputs": x}, weight, dequantized)
    b = proxy({"output_square": square, "input_square": x.t() @ x / 7}, weight, dequantized)
    assert a == pytest.approx(b, rel=1e-5)


def test_an_embedding_row_counts_by_what_its_readings_sum_to():
    """With one column and each row's change alone, the cost is that of the summed gradients of its readings."""
    toy = Toy(1, 1)
    toy.layer = nn.Embedding(9, 1).requires_grad_(False)
    toy.layer.weight.copy_(torch.linspace(-1, 1, 9).unsqueeze(1))
    toy.x = torch.arange(24) % 7
    found = gather(toy, WINDOWS, 0)["layer"]
    rows, g = (each.view(2, 12) for each in toy.seen())
    for row in range(7):
        delta = torch.zeros(9, 1)
        delta[row] = 0.3
        exact = 0.5 * float((0.3 * (g * (rows == row)).sum(1)).square().sum()) / 24
        assert proxy(found, toy.layer.weight, toy.layer.weight + delta) == pytest.approx(exact, rel=1e-4)
    assert found["row_frequency"][7:].tolist() == [0, 0]


def test_embedding_rows_count_as_often_as_they_are_read():
    statistics = {"row_frequency": torch.tensor([0.5, 0.0]), "row_output_square": torch.tensor([1.0, 2.0])}
    weight = torch.zeros(2, 2)
    assert proxy(statistics, weight, torch.tensor([[1.0, 1.0], [9.0, 9.0]])) == pytest.approx(0.5 * 0.5 * 3)


def test_a_layer_that_is_never_used_costs_nothing():
    assert proxy({}, torch.ones(2, 2), torch.zeros(2, 2)) == 0


def test_statistics_that_lost_bytes_are_not_whole(tmp_path):
    file = tmp_path / "statistics" / "one.safetensors"
    assert not is_whole(file)
    save({"layer": {"grad_square": torch.ones(64)}}, file)
    assert is_whole(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_whole(file)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "statistics").touch()
    with pytest.raises(AutoQError, match=r"^the statistics cannot be written to .*AUTOQ_CACHE"):
        save({"layer": {"grad_square": torch.ones(2)}}, tmp_path / "statistics" / "one.safetensors")


def test_old_statistics_make_room_and_the_newest_stays(tmp_path):
    for age, name in enumerate(("new", "used", "old")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "other.txt").write_text("not ours")
    bound(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "other.txt", "used.safetensors"]
    bound(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "other.txt"]
