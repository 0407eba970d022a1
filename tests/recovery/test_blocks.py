"""Block-wise reconstruction on models that have learned something, of several families."""

from __future__ import annotations

import pytest
import torch

from autoq import trained
from autoq.assignment import Assignment
from autoq.bank import digest, pack
from autoq.errors import BadInput
from autoq.evaluation import Evaluator
from autoq.models.prefix import find_chain
from autoq.objectives import distance_of
from autoq.recovery.blocks import BlockTrainer, plan, recover
from autoq.recovery.costs import RIDGE, _cost, costs
from autoq.recovery.trainer import mean_over, recovery_data
from autoq.reference import make_reference
from autoq.scheme import parse_scheme
from autoq.spec import build_spec


@pytest.fixture
def evaluator(request, trained_models, trained_model_dir, tmp_path, monkeypatch):
    """An evaluator of the family that a test names."""
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(trained_models.documentation())
    tokens = {f"{part}_tokens": 256 for part in ("calibration", "search", "report")}
    spec = {
        "model": {"id": str(trained_model_dir(request.param)), "dtype": "bfloat16"},
        "data": {"source": str(tmp_path / "text.txt"), **tokens, "window_tokens": 64},
        "target": {"name": "generic"},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "workers": {"cpus": 1},
    }
    return Evaluator(build_spec(spec))


def uniform(evaluator, text):
    kinds = ("linear", "conv1d")
    return Assignment({layer.name: parse_scheme(text) for layer in evaluator.info.layers if layer.kind in kinds})


def states(evaluator, assignment, layers=None):
    """The hidden states after the last block, by the model as it ships, of the first calibration window."""
    weights, activations, caches = evaluator.swappable(assignment)
    for name, layer in (layers or {}).items():
        weights[name] = layer.dequantize(evaluator.model.weight(name).dtype)
    evaluator.model.swap(weights, activations, caches)
    with torch.no_grad():
        found = evaluator.model.model(evaluator.parts.calibration[:1], output_hidden_states=True).hidden_states[-1]
    evaluator.model.restore()
    return found.float()


@pytest.mark.parametrize("evaluator", ["llama", "gpt2", "mixtral", "gemma3"], indirect=True)
@pytest.mark.parametrize("text", ["rtn-int3-g32", "kmeans3-channel"])
def test_every_block_comes_nearer_and_so_does_the_model(evaluator, tmp_path, text):
    assignment = uniform(evaluator, text)
    found = recover(evaluator, assignment, plan(24, 4, 1.0, 0), None, tmp_path / "recovery")
    assert set(found.layers) == set(assignment)
    errors = found.facts["errors"]
    assert len(errors) == 2
    assert all(after <= before for before, after, _ in errors)
    assert errors[0][1] < errors[0][0]
    assert found.facts["losses"]["24"] < found.facts["losses"]["0"]
    assert not list((tmp_path / "recovery").iterdir())
    for name, layer in found.layers.items():
        assert layer.scheme == assignment[name]
        assert layer.nbytes == evaluator.info.layer(name).nbytes(layer.scheme)
    # On text that it was neither trained on nor chosen by, with nothing of the training left in the model.
    whole = states(evaluator, Assignment({}))
    before, after = states(evaluator, assignment), states(evaluator, assignment, found.layers)
    assert (after - whole).square().sum() < (before - whole).square().sum()
    assert not any(parameter.requires_grad for parameter in evaluator.model.model.parameters())


@pytest.mark.parametrize("evaluator", ["llama"], indirect=True)
def test_the_first_block_errors_are_those_worked_out_by_hand(evaluator, tmp_path):
    """The first block's inputs are the embeddings in both models, and no layer outside is quantized."""
    assignment = uniform(evaluator, "rtn-int2-g32")
    data = evaluator.parts.calibration
    training = BlockTrainer(evaluator, assignment, data, plan(1, 1, 1e-9, 0))
    found = training.run(lambda *_: None, tmp_path / "recovery", lambda _: None)
    outputs = []
    for schemes in (Assignment({}), assignment):
        evaluator.model.swap(*evaluator.swappable(schemes))
        with torch.no_grad():
            held = evaluator.model.model(data[: training.deciding], output_hidden_states=True).hidden_states[1]
        evaluator.model.restore()
        outputs.append(held.float())
    whole, quantized = outputs
    size, cost = whole.norm(dim=-1, keepdim=True), training.costs[0]
    shares = (quantized - whole) / size
    errors = torch.einsum("bti,ij,btj->bt", shares, cost.root @ cost.root.t(), shares) / 2
    turned = (quantized / quantized.norm(dim=-1, keepdim=True) - whole / size)[:, 0]
    errors[:, 0] = cost.sink * turned.square().sum(-1) / 2
    assert found.facts["errors"][0][0] == pytest.approx(float(errors.mean()), rel=0.02)


@pytest.mark.parametrize("evaluator", ["llama", "gpt2", "bert"], indirect=True)
def test_a_blocks_cost_is_what_random_errors_of_its_output_lose(evaluator, monkeypatch):
    """Errors alike in all directions, added to a block's outputs, against the distance that the model measures."""
    monkeypatch.setattr("autoq.recovery.costs.RIDGE", 1e-6)
    model, windows = evaluator.model, torch.cat([evaluator.parts.calibration, evaluator.parts.search])
    model.model.float()
    blocks = find_chain(model, windows[:1, :16]).blocks
    found = costs(model, blocks, windows, 0)
    objective = distance_of(model.info.task)
    reference = make_reference(model, windows, 2**30)
    generator = torch.Generator().manual_seed(0)
    for block, cost in zip(blocks, found, strict=True):
        predicted = []

        def disturb(_, __, output, cost=cost, predicted=predicted):
            size = output.norm(dim=-1, keepdim=True) / output.shape[-1] ** 0.5
            wrong = output + 0.05 * size * torch.randn(output.shape, generator=generator)
            predicted.append(float(cost(wrong, output)))
            return wrong

        handle = block.register_forward_hook(disturb)
        measured = mean_over(model, objective, reference, windows)
        handle.remove()
        assert sum(predicted) / len(predicted) == pytest.approx(measured, rel=0.3)


def test_costs_by_hand():
    cost = _cost(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 6.0)
    torch.testing.assert_close(
        cost.root @ cost.root.t(), torch.tensor([[4.0, 2.0], [2.0, 2.0]]) + 3 * RIDGE * torch.eye(2)
    )
    assert cost.sink == 3.0
    # The first token of twice its size costs nothing, turned by a right angle √2² c₀ / 2 = 3; halved over two tokens.
    target = torch.tensor([[[0.0, 5.0], [3.0, 4.0]]])
    assert cost(target * torch.tensor([[[2.0], [1.0]]]), target) == 0
    assert cost(target + torch.tensor([[[5.0, -5.0], [0.0, 0.0]]]), target) == pytest.approx(1.5)
    # The second is off by 1 of a size of 5: (4 + 3 RIDGE) / 25 / 2, over two tokens.
    assert cost(target + torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), target) == pytest.approx((4 + 3 * RIDGE) / 25 / 4)
    # What no answer depends on: all directions and tokens alike.
    assert torch.equal(_cost(torch.zeros(3, 3), 0.0).root, torch.eye(3))


@pytest.mark.parametrize("evaluator", ["llama"], indirect=True)
def test_layers_that_others_trained_and_layers_outside_stay(evaluator, tmp_path):
    assignment = uniform(evaluator, "rtn-int3-g32")
    first = recover(evaluator, assignment, plan(24, 1, 1.0, 0), None, tmp_path / "recovery")
    digests = {name: digest(layer) for name, layer in first.layers.items()}
    contents = {digest(layer): pack(layer) for layer in first.layers.values()}
    head = {layer.name: parse_scheme("rtn-int8-channel") for layer in evaluator.info.layers if layer.kind == "head"}
    again = Assignment({**assignment, **head}, digests)
    trained.place(again, lambda wanted: {each: contents[each] for each in wanted})
    data = recovery_data(evaluator, None, lambda _: None)
    training = BlockTrainer(evaluator, again, data, plan(4, 1, 1.0, 0))
    second = training.run(lambda *_: None, tmp_path / "again", lambda _: None)
    assert set(second.layers) == set(assignment)
    # It goes on from where the first training ended.
    assert second.facts["errors"][0][0] == pytest.approx(first.facts["errors"][0][1], rel=0.05)


@pytest.mark.parametrize("evaluator", ["t5"], indirect=True)
def test_a_model_that_is_no_chain_is_refused(evaluator, tmp_path):
    with pytest.raises(BadInput, match="no chain of blocks"):
        recover(evaluator, uniform(evaluator, "rtn-int3-g32"), plan(4, 1, 1.0, 0), None, tmp_path)


@pytest.mark.parametrize("evaluator", ["llama"], indirect=True)
def test_only_layers_outside_blocks_are_refused(evaluator, tmp_path):
    head = {layer.name: parse_scheme("rtn-int4-g32") for layer in evaluator.info.layers if layer.kind == "head"}
    with pytest.raises(BadInput, match="no block of the model has a layer that can be trained"):
        recover(evaluator, Assignment(head), plan(4, 1, 1.0, 0), None, tmp_path)


@pytest.mark.parametrize("evaluator", ["llama"], indirect=True)
def test_finished_blocks_are_taken_over_and_damaged_ones_made_again(evaluator, tmp_path):
    assignment, told = uniform(evaluator, "rtn-int3-g32"), []
    data = evaluator.parts.calibration

    def run(note):
        return BlockTrainer(evaluator, assignment, data, plan(6, 1, 1.0, 0)).run(lambda *_: None, tmp_path, note)

    first = run(told.append)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 2
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    again = run(told.append)
    assert "going on from block 2 of 2" in told
    for name, layer in first.layers.items():
        assert all(torch.equal(tensor, again.layers[name].tensors[key]) for key, tensor in layer.tensors.items())
