"""llama.cpp: a list of tensor types as llama-quantize takes it, or the types in an existing GGUF file.

A list is words `expression=type`, separated by blanks or lines, as `--tensor-type-file` reads them and
`--tensor-type` takes one (tools/quantize/quantize.cpp, src/llama-quant.cpp): all before the first `=` is
turned to lower case and is a regular expression that must fit some part of a tensor's name; the first
that fits decides; a type is named in any case. Tensors that no expression fits, llama-quantize gives the
type of its preset, which the list does not say: they stay as they are here.

A type that holds the model's own numbers is `keep`. An importance matrix is used where the file was made
with one and the type takes one, and for types that cannot be made without. Tensors that llama.cpp never
quantizes (positions, a router) stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from autoq.errors import BadInput
from autoq.layer import Layer, ModelInfo
from autoq.recipes._files import Rules, listed, shown
from autoq.recipes._gguf_header import read_header
from autoq.scheme import GGUF_TYPES, Gguf, Keep, Scheme
from autoq.targets import _gguf_names as names

_OWN_TYPE = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_NEVER_QUANTIZED = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight")


def is_type_list(text: str) -> bool:
    """Whether a text is meant as a list of tensor types: its first word tells."""
    first = text.split(maxsplit=1)[:1]
    return bool(first) and "=" in first[0] and first[0][0] not in "=#{\"'"


def list_schemes(text: str, info: ModelInfo) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> schemes in order of preference, for the layers that a list of tensor types names.

    Raises `BadInput` naming the word that is not usable.
    """
    rules, entries, tensors = Rules(), [_entry(word, info) for word in text.split()], _tensors(info)
    found: dict[str, Sequence[Scheme]] = {}
    fitting: set[str] = set()
    for name, tensor in tensors.items():
        for word, expression, kind in entries:
            if rules.search(expression, tensor):
                found[name] = _schemes(kind, info, False)
                fitting.add(word)
                break
    for word, expression, _ in entries:
        if word not in fitting and not any(rules.search(expression, tensor) for tensor in tensors.values()):
            example = next(iter(tensors.values()))
            raise BadInput(f"{shown(word)} fits no tensor of the model's layers, such as {example}")
    return found


def file_schemes(path: Path, info: ModelInfo) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> schemes in order of preference, as a GGUF file of the same model has them.

    Reads the file's header only. Raises `BadInput` for a file that is damaged or of another model.
    """
    header = read_header(path)
    if header.parts > 1:
        raise BadInput(f"is one of {header.parts} parts; merge them with llama-gguf-split first")
    if header.architecture != (own := names.family(info.architecture).name):
        raise BadInput(f"holds a model of architecture {shown(header.architecture)}, and {info.architecture} is {own}")
    layers = {tensor: info.layer(name) for name, tensor in _tensors(info).items()}
    held = {tensor.name: tensor for tensor in header.tensors}
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) > 1 and _quantizable(tensor.name)]
    if unknown := [tensor.name for tensor in matrices if tensor.name not in layers]:
        raise BadInput(f"holds tensors that the model has no layers for: {listed(unknown)}")
    if missing := [tensor for tensor in layers if tensor not in held]:
        raise BadInput(f"lacks tensors of the model: {listed(missing)}")
    found = {}
    for tensor, layer in layers.items():
        _check_shape(tensor, held[tensor].shape, layer)
        try:
            found[layer.name] = _schemes(held[tensor].type, info, header.imatrix)
        except BadInput as problem:
            raise BadInput(f"tensor {tensor}: {problem}") from None
    return found


def _tensors(info: ModelInfo) -> dict[str, str]:
    """Layer name -> tensor name, of what llama.cpp quantizes."""
    tensors = names.layer_tensors(info.architecture, info.layers)
    return {name: tensor for name, tensor in tensors.items() if _quantizable(tensor)}


def _quantizable(tensor: str) -> bool:
    return not tensor.endswith(_NEVER_QUANTIZED)


def _entry(word: str, info: ModelInfo) -> tuple[str, str, str]:
    """The word, its expression and its type."""
    expression, sign, kind = word.partition("=")
    if not (expression and sign and kind):
        raise BadInput(f"{shown(word)} is not of the form expression=type, such as attn_v=q8_0")
    try:
        _schemes(kind.lower(), info, False)
    except BadInput as problem:
        raise BadInput(f"{shown(word)}: {problem}") from None
    # As llama-quantize does, even to \S and \D, which mean the opposite afterwards.
    return word, "".join(c.lower() if c.isascii() else c for c in expression), kind.lower()


def _schemes(kind: str, info: ModelInfo, imatrix: bool) -> Sequence[Scheme]:
    if kind == _OWN_TYPE.get(info.dtype):
        return [Keep()]
    if kind not in GGUF_TYPES:
        choices = ", ".join(sorted({*GGUF_TYPES, *([_OWN_TYPE[info.dtype]] if info.dtype in _OWN_TYPE else [])}))
        raise BadInput(f"type {shown(kind)} has no scheme here for a model in {info.dtype}; choose from {choices}")
    return [Gguf(kind, imatrix), Gguf(kind, not imatrix)]


def _check_shape(tensor: str, shape: tuple[int, ...], layer: Layer) -> None:
    if shape != (layer.in_features, layer.out_features):
        own = (layer.out_features, layer.in_features)
        raise BadInput(f"tensor {tensor} has the shape {tuple(reversed(shape))}, and {layer.name} has {own}")
