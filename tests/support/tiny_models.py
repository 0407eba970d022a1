"""Tiny models of every family, with random weights and a byte-level tokenizer, saved as real checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 300
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 64}

# family -> config class, model class, config
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA_LIKE, "head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(_LLAMA_LIKE)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA_LIKE, **_MOE}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_LLAMA_LIKE, **_QWEN_MOE, **_SHARED_EXPERT}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_LLAMA_LIKE, **_QWEN_MOE, "head_dim": 8}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**_LLAMA_LIKE, **_MOE, "head_dim": 8, "sliding_window": 16}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _BERT_LIKE),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "bert": ("BertConfig", "BertModel", _BERT_LIKE),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", {**_BERT_LIKE, "num_labels": 3}),
    "roberta-classifier": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_BERT_LIKE, "max_position_embeddings": 66, "num_labels": 2},
    ),
    "llama-classifier": (
        "LlamaConfig",
        "LlamaForSequenceClassification",
        {**_LLAMA_LIKE, "num_labels": 2, "pad_token_id": None},
    ),
    "bert-mlm": ("BertConfig", "BertForMaskedLM", _BERT_LIKE),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_BERT_LIKE, "max_position_embeddings": 66}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_BERT_LIKE, "embedding_size": 16}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
    "t5-tied": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
}


def tokenizer(**framing: str) -> Any:
    """A byte-level tokenizer with 260 tokens: four special ones, then the 256 bytes.

    `framing` may give `single`, the template that frames a text (`"<s> $A"`).
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    if framing:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            **framing, special_tokens=[(token, vocabulary[token]) for token in special]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model of `family` with random weights and its tokenizer to `folder`; gives it back."""
    config_class, model_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).to(dtype)
    # Biases and norms start at 0 and 1: random ones tell whether they arrive where they should.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "t5":
        # As T5 v1.1 and Flan are published: a head of its own, which transformers' T5 config cannot say.
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
        save_file(tensors, file, metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def train(model: Any, batches: Iterable[dict[str, torch.Tensor]], rate: float = 1e-2) -> Any:
    """Teach a model that gives a `loss` on each batch, once each; gives it back in eval mode.

    On one thread: two on a busy machine wait for each other, forty times as long as they work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return model.eval()
