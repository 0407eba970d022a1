"""Prefix reuse: outputs are equal bit for bit, whatever was evaluated before, and memory is bounded."""

import random

import pytest
import torch

from autoq.models import load
from autoq.models.prefix import PrefixStates, find_chain
from autoq.spec import ModelSpec

WINDOWS = torch.arange(5, 5 + 3 * 24).reshape(3, 1, 24)
PLENTY = 10**9


@pytest.fixture
def make(tiny_model_dir):
    def build(family, dtype="float32"):
        return load(ModelSpec(id=str(tiny_model_dir(family)), dtype=dtype), "cpu")

    return build


def deep(tiny_models, tmp_path, blocks):
    """A Llama of more blocks than the others have."""
    config, model, settings = tiny_models.FAMILIES["llama"]
    tiny_models.FAMILIES["deep"] = (config, model, {**settings, "num_hidden_layers": blocks})
    try:
        return load(ModelSpec(id=str(tiny_models.save("deep", tmp_path / "deep")), dtype="float32"), "cpu")
    finally:
        del tiny_models.FAMILIES["deep"]


def weights_of(model, schemes):
    """A made-up quantization: the scheme's number is what a weight is rounded to."""
    return {name: torch.round(model.weight(name) * int(text)) / int(text) for name, text in schemes.items()}


def doubled(states):
    return 2 * states


def evaluate(model, states, schemes, place):
    """Outputs with reuse and without, under `schemes`; layers rounded to 16 get a changed input too."""
    activations = {name: doubled for name, text in schemes.items() if text == "16"}
    model.swap(weights_of(model, schemes), activations)
    with torch.inference_mode():
        found, share = states.outputs(WINDOWS[place], place, schemes)
        expected = model.outputs(WINDOWS[place])
    model.restore()
    return found, expected, share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama-tied",
        "gemma2",
        "gemma3",
        "phi3",
        "mixtral",
        "qwen3-moe",
        "gpt-oss",
        "gpt2",
        "gpt-neox",
        "opt",
        "bert",
        "roberta",
    ],
)
def test_outputs_are_equal_to_the_last_bit_in_any_order(make, family, dtype):
    model = make(family, dtype)
    states = PrefixStates(model, WINDOWS[0], len(WINDOWS), PLENTY)
    assert states.chain is not None
    rng = random.Random(0)
    names = [layer.name for layer in model.info.layers]
    schemes, shares = {}, []
    for _ in range(24):
        for name in rng.sample(names, rng.choice([1, 1, 1, 4])):
            schemes[name] = rng.choice(["8", "16", "32"])
            if rng.random() < 0.3:
                del schemes[name]
        for place in rng.sample(range(len(WINDOWS)), 2):
            found, expected, share = evaluate(model, states, schemes, place)
            assert torch.equal(found, expected)
            shares.append(share)
    assert min(shares) < 1
    assert max(shares) == 1


@pytest.mark.parametrize("family", ["t5", "bart", "albert"])
def test_a_model_that_is_no_chain_is_run_in_full(make, family):
    model = make(family)
    states = PrefixStates(model, WINDOWS[0], len(WINDOWS), PLENTY)
    assert states.chain is None
    for _ in range(2):
        found, expected, share = evaluate(model, states, {model.info.layers[0].name: "8"}, 0)
        assert torch.equal(found, expected)
        assert share == 1
    assert states.has(0, {}), "there is nothing to gain"


class Handed(torch.nn.Module):
    """A block that reads what the first block left behind, as a relative position bias is handed on."""

    def __init__(self, block, shared, first):
        super().__init__()
        self.block, self.shared, self.first = block, shared, first

    def forward(self, states, *arguments, **keywords):
        if self.first:
            self.shared["bias"] = states.mean()
        bias = self.shared.pop("bias") if not self.first else 0
        if not self.first:
            self.shared["bias"] = bias
        return self.block(states, *arguments, **keywords) + bias


def test_what_blocks_hand_to_each_other_beside_their_states_is_noticed(make):
    model = make("llama")
    assert find_chain(model, WINDOWS[0]) is not None
    blocks, shared = model.model.model.layers, {}
    for index, block in enumerate(list(blocks)):
        blocks[index] = Handed(block, shared, first=index == 0)
    assert PrefixStates(model, WINDOWS[0], 1, PLENTY).chain is None


class Spoiling(torch.nn.Module):
    """A block that writes to its input."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, states, *arguments, **keywords):
        states.mul_(1.5)
        return self.block(states, *arguments, **keywords)


def test_a_block_that_writes_to_its_input_is_noticed(make):
    model = make("llama")
    blocks = model.model.model.layers
    blocks[1] = Spoiling(blocks[1])
    assert PrefixStates(model, WINDOWS[0], 1, PLENTY).chain is None


def test_what_runs_is_what_comes_from_the_first_difference_on(tiny_models, tmp_path):
    model = deep(tiny_models, tmp_path, 6)
    states = PrefixStates(model, WINDOWS[0], len(WINDOWS), PLENTY)
    counted = [0] * 6
    for index, block in enumerate(model.model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: counted.__setitem__(index, counted[index] + 1))

    def ran(schemes):
        counted[:] = [0] * 6
        model.swap(weights_of(model, schemes))
        with torch.inference_mode():
            share = states.outputs(WINDOWS[0], 0, schemes)[1]
        model.restore()
        return counted.index(1), share

    head = model.info.layer("lm_head").parameters
    block = sum(layer.parameters for layer in model.info.layers if layer.block == 0)
    whole = 6 * block + head
    first, second = "model.layers.2.mlp.up_proj", "model.layers.4.mlp.up_proj"
    assert ran({}) == (0, 1)
    assert ran({first: "8"}) == (2, pytest.approx((4 * block + head) / whole))
    assert ran({first: "8", second: "8"}) == (4, pytest.approx((2 * block + head) / whole))
    assert ran({first: "8", second: "16"})[0] == 4
    assert ran({second: "16"})[0] == 4
    assert ran({first: "16", second: "16"})[0] == 2
    assert ran({"lm_head": "16"})[0] == 5, "inputs of blocks are kept, not the last one's output"
    assert ran({"model.embed_tokens": "16"}) == (0, 1)
    assert ran({})[0] == 5


def test_memory_is_bounded_and_what_was_not_used_for_longest_goes_first(tiny_models, tmp_path):
    model = deep(tiny_models, tmp_path, 6)
    state = 24 * 32 * 4  # tokens, width, bytes of a float32
    states = PrefixStates(model, WINDOWS[0], 1, 4 * 5 * state)
    assert states.every == 1, "five inputs of four assignments just fit"
    name = "model.layers.0.mlp.up_proj"
    for text in ("8", "16", "32", "64"):
        evaluate(model, states, {name: text}, 0)
        assert states._bytes == sum(kept.nbytes for kept, _ in states._kept.values()) <= 4 * 5 * state
    assert evaluate(model, states, {name: "8"}, 0)[2] < 1
    evaluate(model, states, {}, 0)
    assert states._bytes == 4 * 5 * state
    assert evaluate(model, states, {name: "8"}, 0)[2] < 1, "it was used since"
    assert evaluate(model, states, {name: "64"}, 0)[2] < 1

    sparse = PrefixStates(model, WINDOWS[0], 1, 4 * 2 * state)
    assert sparse.every == 3
    evaluate(model, sparse, {}, 0)
    found, expected, share = evaluate(model, sparse, {"model.layers.5.mlp.up_proj": "8"}, 0)
    assert torch.equal(found, expected)
    assert share == pytest.approx(sparse.chain.share(3))
    assert PrefixStates(model, WINDOWS[0], 1, state).chain is None, "no input of four assignments fits"


def from_block(k, text):
    """Another scheme in block `k`: inputs of all blocks after it are other ones."""
    return {f"model.layers.{k}.mlp.up_proj": text}


def test_of_an_assignment_the_inputs_of_its_last_blocks_go_first(tiny_models, tmp_path):
    """What is left still serves those that differ from it later."""
    model = deep(tiny_models, tmp_path, 6)
    state = 24 * 32 * 4
    states = PrefixStates(model, WINDOWS[0], 1, 4 * 5 * state)
    for text in (None, "8", "16", "32"):  # four assignments that have nothing in common fill the memory
        evaluate(model, states, {} if text is None else from_block(0, text), 0)
    # Two more inputs, of blocks 4 and 5: of the assignment that was used least recently blocks 4 and 5 go.
    evaluate(model, states, from_block(0, "32") | from_block(3, "8"), 0)
    found, expected, share = evaluate(model, states, from_block(5, "8"), 0)
    assert torch.equal(found, expected)
    assert share == pytest.approx(states.chain.share(3))


def test_what_was_given_up_goes_before_all_else(tiny_models, tmp_path):
    model = deep(tiny_models, tmp_path, 6)
    states = PrefixStates(model, WINDOWS[0], 1, 4 * 5 * 24 * 32 * 4)
    first, given_up = from_block(0, "8"), from_block(0, "16")
    for schemes in (first, {}, from_block(0, "32"), given_up):
        evaluate(model, states, schemes, 0)
    states.give_up(given_up)
    evaluate(model, states, from_block(0, "64"), 0)
    assert evaluate(model, states, first, 0)[2] < 1, "it was used least recently, but not given up"
    assert evaluate(model, states, given_up, 0)[2] == 1


def test_what_others_share_with_what_was_given_up_stays(tiny_models, tmp_path):
    model = deep(tiny_models, tmp_path, 6)
    states = PrefixStates(model, WINDOWS[0], 1, 4 * 5 * 24 * 32 * 4)
    given_up = from_block(3, "8")
    for schemes in ({}, given_up):
        evaluate(model, states, schemes, 0)
    states.give_up(given_up)
    for text in ("8", "16", "32"):  # 22 inputs where 20 fit
        evaluate(model, states, from_block(0, text), 0)
    assert evaluate(model, states, from_block(5, "16"), 0)[2] == pytest.approx(states.chain.share(5))


def test_giving_up_needs_no_chain(make):
    states = PrefixStates(make("albert"), WINDOWS[0], 1, PLENTY)
    states.give_up({})


def test_what_is_not_to_be_kept_is_not(make):
    model = make("llama")
    states = PrefixStates(model, WINDOWS[0], 1, PLENTY)
    with torch.inference_mode():
        states.outputs(WINDOWS[0], 0, {}, keep=False)
        assert not states.has(0, {})
        states.outputs(WINDOWS[0], 0, {})
    assert states.has(0, {})
    assert not states.has(1, {})
