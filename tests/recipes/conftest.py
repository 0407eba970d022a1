"""A small model known by its skeleton alone, and a target that runs everything."""

import json

import pytest

from autoq.layer import Layer, ModelInfo
from autoq.methods import Grid
from autoq.recipes import read
from autoq.targets import Target

LINEARS = {
    "self_attn.q_proj": (256, 256, "qkv"),
    "self_attn.k_proj": (128, 256, "qkv"),
    "self_attn.v_proj": (128, 256, "qkv"),
    "self_attn.o_proj": (256, 256, None),
    "mlp.gate_proj": (512, 256, "gate_up"),
    "mlp.up_proj": (512, 256, "gate_up"),
    "mlp.down_proj": (256, 512, None),
}
BLOCKS = 2


def llama(tied=False, dtype="bfloat16", architecture="LlamaForCausalLM"):
    """A Llama with two blocks, an embedding of 300 tokens and a head."""
    width = 4 if dtype == "float32" else 2
    layers = [] if tied else [Layer("model.embed_tokens", "embedding", 300, 256, width)]
    for block in range(BLOCKS):
        for name, (rows, columns, group) in LINEARS.items():
            full = f"model.layers.{block}.{name}"
            group = group and f"model.layers.{block}.{group}"
            layers.append(Layer(full, "linear", rows, columns, width, fusion_group=group, block=block))
    layers.append(Layer("lm_head", "head", 300, 256, width, tied=("model.embed_tokens",) if tied else ()))
    return ModelInfo(architecture, "causal", dtype, 300, 128, tuple(layers), 1000)


class Anything(Target):
    """Runs every scheme on every layer, but for what `rules` says."""

    def __init__(self, rules=None, fuses=False):
        self.rules = rules or (lambda layer, scheme: None)
        self.fuses = fuses

    def grid(self):
        return Grid(("rtn",), (4,), (), ("integer",))

    def refuses(self, layer, scheme):
        return self.rules(layer, scheme)


@pytest.fixture
def write(tmp_path):
    """Write a file of a recipe: text, bytes, or plain data as JSON."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe(write):
    """Write a recipe and read it: the assignment's texts without the layers that are kept."""

    def recipe(name, content, info=None, target=None):
        found = read(str(write(name, content)), info or llama(), target or Anything())
        texts = found.assignment.to_dict()
        assert set(texts) == {layer.name for layer in (info or llama()).layers}
        return {name: text for name, text in texts.items() if text != "keep"}

    return recipe
