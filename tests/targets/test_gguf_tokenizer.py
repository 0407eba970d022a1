"""Tokenizers in GGUF: llama.cpp, asked itself, cuts a text of corner cases into the same tokens."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from autoq.errors import ModelRefused
from autoq.models import load
from autoq.spec import ModelSpec
from autoq.targets import _gguf_tokenizer
from autoq.targets._gguf_file import write
from autoq.targets._gguf_tokenizer import pre_tokenizer
from autoq.targets._llama_cpp_engine import library

PROSE = "\n".join(
    pydoc_data.topics.topics[name] for name in ("assert", "lambda", "numbers", "strings", "formatstrings")
)
TEXTS = [
    _gguf_tokenizer._PROBE,
    PROSE,
    "Hello <|endoftext|> there</s><s>again <unk> <pad>",
    "",
    " ",
    "  two spaces\n\n\n",
    "ünïcödé 🙂 \x00\x7f\u200b\ufeff",
]
# One process that loads llama.cpp, for it ends its process when it does not like a file.
TOKENIZE = r"""
import ctypes as C, json, sys
library = C.CDLL(sys.argv[1])
class Parameters(C.Structure):
    _fields_ = [("words", C.c_uint32 * 512)]  # more than it has; passed through, never looked into
def function(name, result, *arguments):
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found
function("llama_backend_init", None)()
defaults = function("llama_model_default_params", Parameters)()
model = function("llama_model_load_from_file", C.c_void_p, C.c_char_p, Parameters)(sys.argv[2].encode(), defaults)
vocabulary = function("llama_model_get_vocab", C.c_void_p, C.c_void_p)(model)
tokenize = function("llama_tokenize", C.c_int32, C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32,
                    C.c_bool, C.c_bool)
found = []
for text in json.load(sys.stdin):
    data = text.encode()
    ids = (C.c_int32 * (len(data) + 8))()
    found.append(ids[: tokenize(vocabulary, data, len(data), ids, len(ids), True, True)])
print(json.dumps(found))
"""


def llama_cpp_tokens(path: Path) -> list[list[int]]:
    ended = subprocess.run(
        [sys.executable, "-c", TOKENIZE, str(library()), str(path)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout)


def byte_level(patterns: tuple[str, ...], whole: bool = False, vocabulary: int = 700) -> Any:
    """A byte-level BPE trained here, that cuts text by `patterns` first."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([PROSE], trainer)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def sentencepiece(space_first: bool = True, eos: bool = False) -> Any:
    """A BPE tokenizer as those are that were converted from SentencePiece: bytes, ▁, and every pair a merge."""
    special = ["<unk>", "<s>", "</s>"]
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    core.train_from_iterator([PROSE], trainer)
    content = json.loads(core.to_str())
    known = content["model"]["vocab"]
    merged = dict.fromkeys(left + right for left, right in content["model"]["merges"])
    content["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in merged
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    core = tokenizers.Tokenizer.from_str(json.dumps(content))
    first = [normalizers.Prepend("▁")] if space_first else []
    core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def written(tokenizer: Any, folder: Path) -> tuple[Any, Path]:
    """The tokenizer as AutoQ loads it, and a GGUF file with it and a tiny model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 4,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load(ModelSpec(id=str(folder), dtype="float32"))
    write(model, {}, folder / "model.gguf")
    return model.tokenizer, folder / "model.gguf"


@pytest.mark.parametrize(("name", "whole"), _gguf_tokenizer._RULES)
def test_every_rule_cuts_as_llama_cpp_does(name, whole, tmp_path):
    tokenizer, path = written(byte_level(_gguf_tokenizer._RULES[name, whole], whole), tmp_path)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    assert llama_cpp_tokens(path) == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("space_first", [True, False])
def test_sentencepiece_merges_as_llama_cpp_does(space_first, tmp_path):
    tokenizer, path = written(sentencepiece(space_first), tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    texts = [text for text in TEXTS if "<" not in text]
    found = dict(zip(TEXTS, llama_cpp_tokens(path), strict=True))
    assert [found[text] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def test_framing_is_found_by_behaviour(tmp_path):
    _, path = written(sentencepiece(eos=True), tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is True
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


def test_kinds_of_tokens_and_the_template(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["a whole phrase"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    _, path = written(tokenizer, tmp_path)
    fields = gguf.GGUFReader(path).fields
    types, kinds = fields["tokenizer.ggml.token_type"].contents(), gguf.TokenType
    texts = fields["tokenizer.ggml.tokens"].contents()
    assert types[0] == kinds.UNKNOWN
    assert types[1] == types[2] == kinds.CONTROL
    assert types[3] == types[258] == kinds.BYTE
    assert types[texts.index("▁the")] == kinds.NORMAL
    assert types[texts.index("a whole phrase")] == kinds.USER_DEFINED
    assert types[-4:] == [kinds.UNUSED] * 4
    assert texts[-1] == f"[PAD{len(texts) - 1}]"
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"


def test_a_rule_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    with pytest.raises(
        ModelRefused, match=r"cuts text into words by a rule .* known are gpt-2, smollm, qwen2"
    ) as refusal:
        written(byte_level((r"\w+|\s+|[^\w\s]+",)), tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_same_rule_with_other_merging_is_another_rule():
    patterns = _gguf_tokenizer._RULES["qwen2", False]
    backend = byte_level(patterns).backend_tokenizer
    assert pre_tokenizer(backend, whole=False) == "qwen2"
    with pytest.raises(ModelRefused, match="no name for"):
        pre_tokenizer(backend, whole=True)


def core(**parts: Any) -> Any:
    """A byte-level tokenizer without merges, some of its parts being others."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def test_qwens_normalization_is_let_through():
    assert pre_tokenizer(core(normalizer=normalizers.NFC()), whole=False) == "gpt-2"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "without a space before the text"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "byte-level BPE"),
        ({"normalizer": normalizers.Lowercase()}, "changes text before it cuts it"),
        ({"normalizer": normalizers.Strip()}, "changes text before it cuts it"),
    ],
)
def test_other_ways_with_text_are_refused(parts, message):
    with pytest.raises(ModelRefused, match=message):
        pre_tokenizer(core(**parts), whole=False)


def test_other_kinds_of_tokenizers_are_refused():
    class Writer:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    unigram = tokenizers.Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram)
    with pytest.raises(ModelRefused, match="knows no Unigram tokenizer; choose from BPE"):
        _gguf_tokenizer.add_tokenizer(Writer(), fast, 10)
    with pytest.raises(ModelRefused, match=r"reads tokenizer.json, and SimpleNamespace has none"):
        _gguf_tokenizer.add_tokenizer(Writer(), SimpleNamespace(), 10)
    small = transformers.PreTrainedTokenizerFast(tokenizer_object=core())
    with pytest.raises(ModelRefused, match="a token 255, and the model's vocabulary ends at 99"):
        _gguf_tokenizer.add_tokenizer(Writer(), small, 100)
