"""A tokenizer's vocabulary and rules in GGUF's keys, so that llama.cpp cuts text as transformers does.

Two kinds can be said in a GGUF file here. Byte-level BPE (`tokenizer.ggml.model` gpt2): tokens, merges, and
the name of the pre-tokenizer, the rule that cuts text into words first. llama.cpp knows such rules by name
only, so the name is found by behaviour: the one rule that cuts a text full of corner cases exactly as the
tokenizer does. SentencePiece's BPE (llama): tokens with scores; llama.cpp joins the pair of best score
first, so the score is minus the rank of the merge that makes the token.

Anything else is refused. llama.cpp's `default` rule would cut text otherwise than the model was trained on,
which no error and no measurement of ours would ever show. One difference is known and left: Qwen's Unicode
normalization (NFC), which llama.cpp leaves out for every model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as InTurn

from autoq.errors import ModelRefused

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _tiktoken(digits: str, letters: str = r"\p{L}") -> str:
    """The rule that OpenAI's cl100k began: contractions in any case, and at most so many digits together."""
    others = r"\s\p{L}\p{N}" if letters == r"\p{L}" else r"\s\p{L}\p{M}\p{N}"
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|\p{{N}}{digits}"
        rf"| ?[^{others}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, suffix: str) -> str:
    """The rule of o200k and of Mistral's Tekken: a word ends where lower case turns to upper."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}[{_UPPER}]*[{_LOWER}]+{suffix}|{start}[{_UPPER}]+[{_LOWER}]*{suffix}|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# (llama.cpp's name, whether it takes a word that is a token as it is): the patterns that cut text in turn.
_RULES: dict[tuple[str, bool], tuple[str, ...]] = {
    ("gpt-2", False): (_GPT2,),
    ("smollm", False): (r"\p{N}", _GPT2),
    ("qwen2", False): (_tiktoken(""),),
    ("qwen35", False): (_tiktoken("", r"\p{L}\p{M}"),),
    ("llama-bpe", True): (_tiktoken("{1,3}"),),
    ("smaug-bpe", False): (_tiktoken("{1,3}"),),
    ("tekken", True): (_cased("", ""),),
    ("gpt-4o", False): (_cased("{1,3}", f"(?i:{_CONTRACTIONS})?"),),
}

# What the rules above cut differently: contractions, digits, cases, spaces, newlines, marks, other scripts.
_PROBE = (
    "I'm we'LL don't THEY'RE it's'd  3 33 333 4444 x12345y ½² ١٢٣ HelloWorld HTMLparser iPhone\n\n  \t\n indented \r\n"
    " end.  ...!?\n\n#if(a[0]){b/=c;}//d\n/ https://e.org/f_g-h @user $5.50 «naïve» café cafe\u0301 नमस्ते ไทย "
    "你好，世界。かなカナ 한국어 Ελλάδα привет עברית ﷺ 😀👍🏽 a\u00a0b\u3000c ǅ ʰʷ 'S'T 'twas _x__y --z   "
)
_SPACE = "▁"  # SentencePiece's own
# llama.cpp wants merges, and GGUF has no empty list: where nothing is merged, symbols of two letters never arise.
_NEVER = ("--", "--")


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Add the keys of a transformers tokenizer to a `gguf.GGUFWriter`.

    `vocabulary` is the number of rows of the embedding; rows without a token are filled with unused ones.
    Raises `ModelRefused` for a tokenizer that GGUF cannot say.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelRefused(f"GGUF export reads tokenizer.json, and {type(tokenizer).__name__} has none")
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise ModelRefused(f"GGUF export knows no {content['model']['type']} tokenizer; choose from BPE")
    pieces = content["model"]["byte_fallback"]
    texts = _tokens(tokenizer, vocabulary)
    # Merges are pairs in newer files and one text in older ones.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if pieces:
        space_first = _space_first(backend)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(texts)
        writer.add_token_scores(_scores(texts, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(backend, bool(content["model"]["ignore_merges"])))
        writer.add_token_list(texts)
        writer.add_token_merges([" ".join(merge) for merge in merges or [_NEVER]])
        space_first = False
    writer.add_token_types(_types(tokenizer, texts, content["model"]["unk_token"], pieces))
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(framed) > 1 and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(framed) > 1 and framed[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(space_first)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def pre_tokenizer(backend: Any, whole: bool) -> str:
    """llama.cpp's name for how a byte-level tokenizer (of the package tokenizers) cuts text into words.

    `whole` says that a word which is a token is taken as it is, whatever its merges (`ignore_merges`).

    Raises `ModelRefused` for a way that it has no name for.
    """
    steps = backend.pre_tokenizer
    if steps is None or steps.pre_tokenize_str("é")[0][0] != "Ã©" or steps.pre_tokenize_str("a")[0][0] != "a":
        raise ModelRefused("GGUF export knows byte-level BPE without a space before the text, and BPE with byte tokens")
    if backend.normalizer is not None and backend.normalizer.normalize_str("Ab\u00a0 \n") != "Ab\u00a0 \n":
        raise ModelRefused("the tokenizer changes text before it cuts it, and llama.cpp does not")
    found = _cuts(steps)
    for (name, takes_whole), patterns in _RULES.items():
        if takes_whole == whole and found == _rule_cuts(patterns):
            return name
    raise ModelRefused(
        "the tokenizer cuts text into words by a rule that llama.cpp has no name for, or that is not known here; "
        f"known are {', '.join(name for name, _ in _RULES)}"
    )


def _cuts(steps: PreTokenizer) -> list[tuple[int, int]]:
    """First and last character of each word of the probe."""
    return [place for _, place in steps.pre_tokenize_str(_PROBE)]


@functools.lru_cache
def _rule_cuts(patterns: tuple[str, ...]) -> list[tuple[int, int]]:
    return _cuts(InTurn([Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]))


def _space_first(backend: Any) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text. Raises `ModelRefused` for other kinds."""
    text = "a  b"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = (
        [text] if backend.pre_tokenizer is None else [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )
    if words not in ([f"{_SPACE}a{_SPACE * 2}b"], [f"a{_SPACE * 2}b"]):
        raise ModelRefused("the tokenizer has byte tokens but does not treat spaces as SentencePiece does")
    return str(words[0]).startswith(_SPACE)


def _tokens(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every row of the embedding."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= vocabulary:
        raise ModelRefused(
            f"the tokenizer has a token {max(texts)}, and the model's vocabulary ends at {vocabulary - 1}"
        )
    return [texts.get(number, f"[PAD{number}]") for number in range(vocabulary)]


def _types(tokenizer: Any, texts: Sequence[str], unknown: str | None, pieces: bool) -> list[int]:
    import gguf

    kinds: Any = gguf.TokenType
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder

    def kind(number: int, text: str) -> Any:
        if text not in known:
            return kinds.UNUSED
        if pieces and text == unknown:
            return kinds.UNKNOWN
        if number in added:
            return kinds.CONTROL if added[number].special else kinds.USER_DEFINED
        return kinds.BYTE if pieces and len(text) == 6 and text.startswith("<0x") else kinds.NORMAL

    return [int(kind(number, text)) for number, text in enumerate(texts)]


def _scores(texts: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Minus the rank of the first merge that makes each token; tokens that none makes come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [float(-ranks.get(text, len(merges))) for text in texts]
