"""Tiny models of several families, built on the spot from configs with fixed random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from autoq import plugins
from autoq.layer import Layer, LayerKind, ModelInfo, Task
from autoq.methods import Method, QuantizedWeight
from autoq.scheme import Keep, Scheme, parse_scheme
from autoq.targets import Target

# A conftest is imported before the filters for warnings are set, and transformers imports what warns.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autoq.models.loaded import LoadedModel

VOCABULARY, WIDTH = 96, 64


def _llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128))


def _t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return T5ForConditionalGeneration(config)


def _bert() -> PreTrainedModel:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return BertForMaskedLM(config)


FAMILIES: Mapping[str, tuple[Callable[[], PreTrainedModel], Task]] = {
    "llama": (_llama, "causal"),
    "gpt2": (_gpt2, "causal"),
    "t5": (_t5, "seq2seq"),
    "bert": (_bert, "masked"),
}


def _layers(model: PreTrainedModel) -> list[Layer]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    named = dict(model.named_modules())
    embeddings = {name: module for name, module in named.items() if isinstance(module, nn.Embedding)}
    layers = []
    for name, module in named.items():
        kind: LayerKind
        if module is head:
            kind = "head"
        elif isinstance(module, Conv1D):
            kind = "conv1d"
        elif isinstance(module, nn.Linear):
            kind = "linear"
        else:
            continue
        out, inputs = module.weight.shape[::-1] if kind == "conv1d" else module.weight.shape
        tied = tuple(other for other, e in embeddings.items() if e.weight is module.weight)
        biased = getattr(module, "bias", None) is not None
        layers.append(Layer(name, kind, out, inputs, module.weight.element_size(), biased, tied))
    return layers


@pytest.fixture
def tiny() -> Callable[..., LoadedModel]:
    """A loaded tiny model of a family (`llama`, `gpt2`, `t5`, `bert`) in a dtype."""
    from autoq.models.loaded import LoadedModel

    def make(family: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
        build, task = FAMILIES[family]
        torch.manual_seed(0)
        model = build().to(dtype).requires_grad_(False)
        # Random weights are too small to tell a working layer from a missing one; T5's are not, and
        # larger ones make its unscaled attention chaotic.
        for parameter in model.parameters():
            if parameter.ndim == 2 and family != "t5":
                parameter.mul_(4)
        info = ModelInfo(
            type(model).__name__,
            task,
            str(dtype).removeprefix("torch."),
            VOCABULARY,
            None if family == "t5" else 128,
            tuple(_layers(model)),
            0,
        )
        return LoadedModel(model, None, info)

    return make


@pytest.fixture
def quantize() -> Callable[[torch.Tensor, str], QuantizedWeight]:
    """A weight (out, in) under a scheme's text, by its method."""

    def run(weight: torch.Tensor, text: str) -> QuantizedWeight:
        scheme = parse_scheme(text)
        method = plugins.load("methods", scheme.method, Method)
        return method.quantize(weight, scheme)

    return run


@pytest.fixture
def deal(quantize: Callable[[torch.Tensor, str], QuantizedWeight]) -> Callable[..., dict[str, QuantizedWeight]]:
    """Quantized weights for a model: layers take the given schemes in turn, where the target runs them."""

    def run(model: LoadedModel, target: Target, *texts: str) -> dict[str, QuantizedWeight]:
        weights = {}
        for index, layer in enumerate(model.info.layers):
            turn = [texts[(index + shift) % len(texts)] for shift in range(len(texts))]
            usable = [text for text in turn if target.refuses(layer, parse_scheme(text)) is None]
            scheme: Scheme = parse_scheme(usable[0]) if usable else Keep()
            weights[layer.name] = quantize(model.weight(layer.name), str(scheme))
        return weights

    return run
