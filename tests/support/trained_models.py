"""Small models of every family that have learned something: quality that can be lost when bits go down.

Two blocks of width 64 over bytes, trained in float32 on Python's own documentation for seconds, then saved as real
bfloat16 checkpoints. Causal models learn the next byte, masked ones the bytes that are hidden from them and those that
are not, an encoder without a head does so with a head that is thrown away, and sequence-to-sequence models
learn to copy.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny_models
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

WIDTH, TOKENS, SEQUENCES = 64, 32, 8
STEPS, RATE = 100, 1e-2
MASKED = 0.15

# Weights begin as wide as such a narrow model needs: at the libraries' 0.02 its blocks have learned nothing by then.
_COMMON = {
    "vocab_size": tiny_models.VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "init_std": 0.1,
}
_LLAMA = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_BERT = {**_NEOX, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MIXTURE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {**_COMMON, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_OPT = {
    **_COMMON,
    "hidden_size": WIDTH,
    "word_embed_proj_dim": 32,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}
_GPT2 = {
    **_COMMON,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
_BART = {
    **_COMMON,
    "d_model": WIDTH,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 128))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "max_position_embeddings": 128,
    "dropout": 0.0,
}

# family -> config class, model class, config
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "phi": ("PhiConfig", "PhiForCausalLM", _NEOX),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MIXTURE),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_BERT, "max_position_embeddings": 130}),
    "minilm": ("BertConfig", "BertModel", _BERT),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
}


@functools.cache
def documentation() -> str:
    """Some of the documentation's text."""
    from pydoc_data import topics

    return "\n".join(entry for _, entry in sorted(topics.topics.items()))[:60_000]


@functools.cache
def _tokens() -> Tensor:
    ids: Tensor = tiny_models.tokenizer()(documentation(), return_tensors="pt").input_ids[0]
    return ids


def loss_of(model: Any, ids: Tensor, masks: torch.Generator) -> Tensor:
    """The training loss of a batch (sequences, tokens), by what the model is for."""
    if type(model).__name__.endswith("MaskedLM"):
        hidden = torch.rand(ids.shape, generator=masks) < MASKED
        logits = model(input_ids=ids.masked_fill(hidden, 3)).logits
        found: Tensor = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return found
    more = {} if model.config.is_encoder_decoder else {"use_cache": False}
    loss: Tensor = model(input_ids=ids, labels=ids, **more).loss
    return loss


def save(family: str, folder: Path) -> Path:
    """Train a model of `family` and write it and its tokenizer to `folder`; gives it back."""
    config_class, model_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    headless = model_class == "BertModel"
    model = getattr(transformers, "BertForMaskedLM" if headless else model_class)(config).train()
    if headless:
        model.bert = transformers.BertModel(config)  # with the pooler that a model with a head has not
    ids, masks = _tokens(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - TOKENS, (SEQUENCES, 1), generator=masks)
        loss = loss_of(model, ids[starts + torch.arange(TOKENS)], masks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    trained = model.bert if headless else model
    trained.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder
