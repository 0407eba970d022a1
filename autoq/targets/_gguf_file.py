"""One GGUF file: written from quantized weights, sized before there are any, and read back.

GGUF v3 holds keys, then the tensors' names, shapes, types and places, then the tensors, each padded to 32
bytes. A layer lies in the file exactly as its `QuantizedWeight` holds it; norms, biases and whatever else
is no layer are float32, as llama.cpp wants them. Where llama.cpp turns rotary positions in another order,
the rows of q and k are put into that order: a row's blocks move as a whole, so nothing is rounded again.

Nothing in a file depends on when or where it was written.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoq.errors import AutoQError, SchemeRefused
from autoq.layer import Layer, ModelInfo
from autoq.methods import QuantizedWeight
from autoq.methods._gguf_weight import GgufWeight
from autoq.methods._weights import KeptWeight
from autoq.models.loaded import LoadedModel
from autoq.scheme import GGUF_TYPES, Gguf, Keep
from autoq.spec import ModelSpec
from autoq.targets._gguf_metadata import add_metadata, rotary_factors
from autoq.targets._gguf_names import family, heads_of, layer_tensors, parameter_name, tensor_name
from autoq.targets._gguf_tokenizer import add_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
_ALIGNMENT = 32
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: `kind` is ggml's name of its type, `shape` (rows, columns) or (numbers,).

    `data` gives its bytes, and is called once, when they are written. `layer` says that it is one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Array]
    layer: bool = False


def write(model: LoadedModel, weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write `model` with `weights` (layer name -> weight; a layer that is not named is kept) as one GGUF file.

    Raises `ModelRefused` for a model or tokenizer that GGUF or llama.cpp cannot hold, `SchemeRefused` for a
    weight that is neither kept nor of a GGUF type, and `AutoQError` where the file cannot be written; then
    there is no file.
    """
    config: Any = model.model.config
    layers = {layer.name: weights.get(layer.name) or _kept(model.weight(layer.name)) for layer in model.info.layers}
    entries = list(_entries(model.info, config, model.model, layers))
    if model not in _written_keys:
        _written_keys[model] = _keys(model.info, config, model.tokenizer)
    try:
        with path.open("wb") as file:
            file.write(_head(_written_keys[model], entries))
            for entry in entries:
                file.write(entry.data().data)
                file.write(bytes(_padded(entry.nbytes) - entry.nbytes))
    except BaseException as problem:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(problem, OSError):
            raise AutoQError(f"{path.name} cannot be written: {problem.strerror or problem}") from problem
        raise


# A tokenizer of 50 000 tokens takes most of a second to put into keys, and a cost table writes many files.
_written_keys: weakref.WeakKeyDictionary[LoadedModel, bytes] = weakref.WeakKeyDictionary()


def other_bytes(info: ModelInfo, folder: Path) -> int:
    """Bytes of the file that are not layers' weights: keys with the tokenizer, tensor table, norms, padding.

    `folder` holds the model's config, tokenizer and safetensors, of which only names and shapes are read.
    Exact where every layer's bytes are a multiple of 32, else short by less than 32 bytes a layer. Raises
    `ModelRefused` as `write` does.
    """
    from autoq.models import inspection
    from autoq.models.loading import read_tokenizer

    family(info.architecture)
    spec = ModelSpec.model_construct(id=str(folder), dtype=info.dtype, revision=None)
    config = inspection.read_config(spec, folder)
    skeleton, _ = inspection.build(spec, folder, config)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    layers: dict[str, QuantizedWeight] = {
        layer.name: _kept(_oriented(layer, parameters[f"{layer.name}.weight"].data)) for layer in info.layers
    }
    entries = list(_entries(info, config, skeleton, layers))
    head = _head(_keys(info, config, read_tokenizer(spec, folder)), entries)
    stored = sum(_padded(entry.nbytes) for entry in entries)
    return len(head) + stored - sum(entry.nbytes for entry in entries if entry.layer)


def _keys(info: ModelInfo, config: Any, tokenizer: Any) -> bytes:
    """The file up to and with its keys, as the package gguf writes a file without tensors."""
    import gguf

    writer = gguf.GGUFWriter(None, family(info.architecture).name)
    add_metadata(writer, info.architecture, config)
    add_tokenizer(writer, tokenizer, info.vocab_size)
    with tempfile.TemporaryDirectory(prefix="autoq-gguf-") as scratch:
        path = Path(scratch, "keys.gguf")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.close()
        return path.read_bytes()


def _head(keys: bytes, entries: Sequence[_Entry]) -> bytes:
    """Everything before the first tensor: `keys` with the number of tensors, and the table of tensors, padded.

    GGUF v3: magic, version, number of tensors (the 8 bytes from the 8th), number of keys, keys, then for each
    tensor its name, dimensions (rows last), type, and place from the first tensor's on; little-endian.
    """
    import gguf

    parts = [keys[:8], struct.pack("<Q", len(entries)), keys[16:]]
    place = 0
    for entry in entries:
        name = entry.name.encode()
        parts.append(struct.pack("<Q", len(name)) + name)
        parts.append(struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape)))
        parts.append(struct.pack("<IQ", gguf.GGMLQuantizationType[entry.kind], place))
        place += _padded(entry.nbytes)
    head = b"".join(parts)
    return head.ljust(_padded(len(head)), b"\0")


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _oriented(layer: Layer, weight: Tensor) -> Tensor:
    return weight.t() if layer.kind == "conv1d" else weight


def _kept(weight: Tensor) -> QuantizedWeight:
    return KeptWeight(Keep(), (weight.shape[0], weight.shape[1]), {"weight": weight})


def _entries(
    info: ModelInfo, config: Any, model: nn.Module, weights: Mapping[str, QuantizedWeight]
) -> Iterator[_Entry]:
    """Every tensor of the file, in the model's order. No byte of a weight is read."""
    named = layer_tensors(info.architecture, info.layers)
    owners = {f"{name}.weight": layer for layer in info.layers for name in (layer.name, *layer.tied)}
    written: set[str] = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        if (layer := owners.get(name)) is None:
            yield _other(info.architecture, config, name, parameter.detach())
        elif layer.name not in written:
            written.add(layer.name)
            yield _layer(info.architecture, config, layer.name, named[layer.name], weights[layer.name])
    if (factors := rotary_factors(config)) is not None:
        yield _Entry("rope_freqs.weight", "F32", factors.shape, factors.nbytes, lambda: factors)


def _layer(architecture: str, config: Any, layer: str, name: str, weight: QuantizedWeight) -> _Entry:
    scheme = weight.scheme
    if isinstance(scheme, Gguf):
        kind, stored = scheme.type.upper(), weight.tensors["blocks"]
    elif isinstance(scheme, Keep):
        stored = weight.tensors["weight"]
        kind = _DTYPES[stored.dtype]
    else:
        raise SchemeRefused(f"layer {layer} as {scheme}: a GGUF file holds GGUF types and kept weights only")
    order = _row_order(architecture, config, name, weight.shape[0])
    return _Entry(name, kind, weight.shape, weight.nbytes, lambda: _bytes(stored, order), layer=True)


def _other(architecture: str, config: Any, parameter: str, tensor: Tensor) -> _Entry:
    name = parameter_name(architecture, parameter)
    order = _row_order(architecture, config, name, tensor.shape[0])
    return _Entry(name, "F32", tuple(tensor.shape), 4 * tensor.numel(), lambda: _bytes(tensor.float(), order))


def _bytes(tensor: Tensor, order: Tensor | None) -> Array:
    """The tensor's bytes, rows in `order`; a view where nothing moves."""
    rows = tensor.cpu() if order is None else tensor.cpu()[order]
    return rows.contiguous().flatten().view(torch.uint8).numpy()


def _row_order(architecture: str, config: Any, tensor: str, rows: int) -> Tensor | None:
    """Which row of the model each row of the file is: `in_file = in_model[order]`; None for the same order."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = heads_of(family(architecture), tensor, config.num_attention_heads, kv_heads)
    return None if heads is None else _interleaved(rows, heads)


def _interleaved(rows: int, heads: int) -> Tensor:
    """Halves of each head, one number of each in turn: 0, h/2, 1, h/2 + 1, … of a head of h rows."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


class GgufFile:
    """A GGUF file that holds the layers of a model, by its own header.

    Raises `AutoQError` for a file that is not GGUF, not whole, or not of `architecture` (a transformers
    class), and `ModelRefused` for an architecture that is not supported.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        try:
            from libgguf import inspect as reading
        except ImportError:
            raise AutoQError("GGUF files are read by libgguf: pip install 'autoq[llama-cpp]'") from None

        self.architecture, self._name = architecture, path.name
        try:
            self._file = reading.inspect_gguf(path, max_array_values=0)
        except (OSError, ValueError, OverflowError, MemoryError) as problem:
            raise AutoQError(f"{path.name} cannot be read as GGUF: {problem}") from None
        for tensor in self._file.tensors:
            if tensor.nbytes is None or tensor.data_offset + tensor.nbytes > self._file.file_size:
                raise AutoQError(f"{path.name} is not whole: the bytes of {tensor.name} are missing or not known")
        wanted, found = family(architecture).name, self._key("general.architecture")
        if found != wanted:
            raise AutoQError(f"{path.name} holds a model of architecture {found}, not of {wanted} ({architecture})")

    def _key(self, name: str) -> Any:
        found = self._file.metadata.get(name)
        return None if found is None else found.value

    def _tensor(self, layer: str) -> Any:
        """The layer's tensor; a head without one of its own is the embedding."""
        name = tensor_name(self.architecture, layer)
        found = self._file.get_tensor(name)
        if found is None and name == "output.weight":
            found = self._file.get_tensor("token_embd.weight")
        if found is None:
            raise AutoQError(f"{self._name} has no tensor {name} for the layer {layer}")
        return found

    def kind(self, layer: str) -> str:
        """The layer's GGUF type as the file says it, in lower case: `q4_k`, `bf16`, `f32`, …"""
        return str(self._tensor(layer).qtype).lower()

    def layer(self, layer: str) -> QuantizedWeight:
        """The layer's weight as it lies in the file, rows in the model's order.

        Whether an importance matrix was used, a file does not say: the scheme is the one without.
        Raises `AutoQError` for a type that AutoQ does not make.
        """
        tensor, kind = self._tensor(layer), self.kind(layer)
        columns, rows = tensor.shape
        stored = torch.frombuffer(bytearray(self._file.read_tensor_bytes(tensor)), dtype=torch.uint8).view(rows, -1)
        known = family(self.architecture)
        every = self._key(f"{known.name}.attention.head_count")
        heads = heads_of(known, tensor.name, every, self._key(f"{known.name}.attention.head_count_kv") or every)
        if heads is not None:
            if heads < 1 or rows % (2 * heads):
                raise AutoQError(
                    f"{self._name} says {heads} heads, which do not divide the {rows} rows of {tensor.name}"
                )
            stored = stored[torch.argsort(_interleaved(rows, heads))]
        if kind == "f32":
            return _kept(stored.view(torch.float32))
        if kind not in GGUF_TYPES:
            raise AutoQError(f"{self._name} holds {layer} as {kind}; choose from {', '.join(GGUF_TYPES)}, f32")
        return GgufWeight(Gguf(kind), (rows, columns), {"blocks": stored})


def layer_types(path: Path, architecture: str, layers: Iterable[str]) -> dict[str, str]:
    """Layer name -> GGUF type in lower case (`q4_k`, `f16`, `f32`), read from the file's own header.

    Raises as `GgufFile` does.
    """
    file = GgufFile(path, architecture)
    return {layer: file.kind(layer) for layer in layers}


def read_layer(path: Path, architecture: str, layer: str) -> QuantizedWeight:
    """One layer's weight as it lies in the file: see `GgufFile.layer`."""
    return GgufFile(path, architecture).layer(layer)
