"""What calibration tells of a layer's inputs, and that layers which read the same share it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from autoq.calibration import _hooks
from autoq.calibration._gradients import product
from autoq.calibration.curvature import gather, load, save

WINDOWS = torch.arange(24).view(2, 12)


class Wired:
    """Layers a, b, c of `columns` inputs: `wiring` says, per run, which of two inputs each of them reads, in turn."""

    device = torch.device("cpu")

    def __init__(self, columns, wiring, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.given = torch.randn(2, 24, columns, generator=generator).to(dtype)
        self.layers = {name: nn.Linear(columns, 3, dtype=dtype).requires_grad_(False) for name in "abc"}
        self.head = torch.randn(7, 3, generator=generator).to(dtype)
        self.info = SimpleNamespace(task="causal", layers=[SimpleNamespace(name=name, stack=None) for name in "abc"])
        self.wiring = wiring

    def modules_of(self, layer):
        return [self.layers[layer.name]]

    def positions(self, tokens):
        return tokens

    def length(self, data):
        return data.shape[1]

    def tokens(self, data):
        return data.numel()

    def outputs(self, ids):
        hidden = 0
        for run in self.wiring[int(ids[0, 0]) // 12]:
            inputs = [given[ids] for given in self.given]
            for name, which in run:
                hidden = hidden + self.layers[name](inputs[which])
        return hidden.tanh() @ self.head.t()

    def read(self, name):
        """The rows that a layer reads in all."""
        rows = []
        for window, runs in enumerate(self.wiring):
            rows += [self.given[which][WINDOWS[window]] for run in runs for own, which in run if own == name]
        return torch.cat(rows)


ALIKE = [("a", 0), ("b", 0), ("c", 1)]
WIRINGS = {
    "a and b read one input": [[ALIKE], [ALIKE]],
    "a and b part": [[ALIKE], [[("a", 0), ("b", 1), ("c", 1)]]],
    "b and c find each other": [[[("a", 0), ("b", 1), ("c", 0)]], [[("a", 0), ("b", 1), ("c", 1)]]],
    "a runs twice": [[ALIKE, [("a", 1)]], [ALIKE]],
    "b comes later": [[[("a", 0), ("c", 1)]], [ALIKE]],
    "in another order": [[ALIKE], [[("b", 0), ("a", 0), ("c", 1)]]],
}


@pytest.mark.parametrize("columns", [5, 40])  # fewer and more than tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_second_moments_are_plain_means_over_all_that_a_layer_read(wiring, dtype, columns):
    model = Wired(columns, WIRINGS[wiring], dtype)
    found = gather(model, WINDOWS, 0)
    for name in "abc":
        x = model.read(name).double()
        if columns == 5:
            assert torch.allclose(found[name]["hessian"].double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-6)
            assert torch.equal(found[name]["hessian"], found[name]["hessian"].t())
        else:
            assert "hessian" not in found[name]
            assert found[name]["input_rows"].dtype == dtype
            assert torch.equal(found[name]["input_rows"].double(), x)
        assert torch.equal(found[name]["input_peak"].double(), x.abs().amax(0))
        assert torch.allclose(found[name]["input_mean_square"].double(), x.square().mean(0), rtol=1e-5)
        assert found[name]["input_range"].tolist() == [float(x.min()), float(x.max())]


@pytest.mark.parametrize(("columns", "key"), [(5, "hessian"), (40, "input_rows")])
def test_layers_that_read_the_same_share_one_tensor_in_memory_and_on_disk(columns, key, tmp_path):
    found = gather(Wired(columns, WIRINGS["a and b read one input"]), WINDOWS, 0)
    assert found["a"][key] is found["b"][key]
    assert found["a"][key] is not found["c"][key]
    path = tmp_path / "statistics.safetensors"
    save(found, path)
    with safe_open(path, framework="pt") as file:
        assert sum(name.endswith(key) for name in file.keys()) == 2  # noqa: SIM118 - not a dict
    for name in "abc":
        back = load(path, name)
        assert set(back) == set(found[name])
        assert all(torch.equal(back[each], tensor) for each, tensor in found[name].items())


def test_a_layer_of_too_many_inputs_has_no_second_moments(monkeypatch):
    monkeypatch.setattr(_hooks, "MOST_HESSIAN_INPUTS", 39)
    found = gather(Wired(40, WIRINGS["a runs twice"]), WINDOWS, 0)["a"]
    assert not {"hessian", "input_rows"} & set(found)
    assert found["input_mean_square"].shape == (40,)


def test_products_of_bfloat16_numbers_lose_nothing_and_the_setting_comes_back():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 40, generator=generator).bfloat16().float()
    b = torch.randn(300, 24, generator=generator)
    setting = torch.backends.mkldnn.matmul.fp32_precision
    exact = a.double().t() @ a.double()
    total = torch.ones(40, 40)
    assert torch.allclose(product(a, a, torch.bfloat16).double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.allclose(product(a, a, torch.bfloat16, total).double(), exact + 1, rtol=1e-5, atol=1e-4)
    assert torch.allclose(total.double(), exact + 1, rtol=1e-5, atol=1e-4)
    assert torch.allclose(product(a, b, torch.float32).double(), a.double().t() @ b.double(), rtol=1e-5, atol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_of_many_inputs_are_made_in_panels(dtype):
    """Two panels and a rest; exact, symmetric, and of two sets of readers together."""
    model = Wired(1200, WIRINGS["a and b part"], dtype)
    gatherer = _hooks.Gatherer(model, 1200)
    with gatherer.watching():
        for window in WINDOWS:
            with gatherer.passing(backward=False):
                model.outputs(window.unsqueeze(0))
    for name in "abc":
        x = model.read(name).double()
        own = _hooks.mean_moments(gatherer.by_module[model.layers[name]])
        assert torch.allclose(own.double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(own, own.t())


def test_labels_are_drawn_as_the_model_predicts():
    """A head of three classes whose gradients, p minus one-hot, average to zero over many draws."""

    class Constant(Wired):
        def outputs(self, ids):
            hidden = self.layers["a"](torch.ones(1, ids.shape[1], 5))
            return hidden * 0 + torch.tensor([0.0, 1.0, 2.0])

    model = Constant(5, None)
    model.info.layers = model.info.layers[:1]
    gradients = []
    seen = model.outputs

    def outputs(ids):
        y = seen(ids)
        y.register_hook(lambda grad: gradients.append(grad[0]))
        return y

    model.outputs = outputs
    gather(model, torch.arange(2000).view(2, 1000), 0)
    g = torch.cat(gradients)
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert torch.allclose(g.mean(0), torch.zeros(3), atol=0.03)
    assert torch.allclose(g.square().mean(0), p * (1 - p), atol=0.02)


def test_functions_are_watched_while_an_embedding_runs_and_no_longer():
    embedding, look_ups = torch.nn.Embedding(4, 2), _hooks.LookUps()
    handles = list(look_ups.watch(embedding))
    ids = torch.tensor([[3, 0]])
    embedding(ids)
    assert look_ups.ids is ids
    torch.nn.functional.embedding(torch.tensor([1]), embedding.weight)
    assert look_ups.ids is ids
    with pytest.raises(IndexError):
        embedding(torch.tensor([4]))
    torch.nn.functional.embedding(torch.tensor([1]), embedding.weight)
    assert look_ups.ids.tolist() == [4]
    for handle in handles:
        handle.remove()
    embedding(ids)
    assert look_ups.ids.tolist() == [4]
