"""GGUF files to be timed: many of one model, each written in a fraction of a second.

All files of a model hold the same keys, and building those takes seconds (a tokenizer has a hundred
thousand entries). So the unquantized model is written once, as it is exported; every other file copies its
keys and its kept tensors, and puts in quantized layers. Rows lie in the model's order even where llama.cpp
has another, for it takes the same time either way; a file that is to answer is written by `_gguf_file`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoq.errors import AutoQError
from autoq.methods import QuantizedWeight
from autoq.methods._gguf_weight import GgufWeight
from autoq.models.loaded import LoadedModel
from autoq.scheme import Gguf
from autoq.targets import _gguf_file
from autoq.targets._gguf_names import layer_tensors

_ALIGNMENT = 32
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the unquantized file: `kind` is ggml's name of its type; `shape` as GGUF has it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TimingFiles:
    """Writes files of one model. The unquantized one, at `path`, may be deleted: it stays open until `close`."""

    def __init__(self, model: LoadedModel, path: Path) -> None:
        from libgguf import inspect as reading

        _gguf_file.write(model, {}, path)
        self.path = path
        self._of_layer = layer_tensors(model.info.architecture, model.info.layers)
        found = reading.inspect_gguf(path, max_array_values=0).tensors
        self._tensors = [_Stored(t.name, str(t.qtype), tuple(t.shape), t.data_offset, t.nbytes) for t in found]
        start = min(tensor.start for tensor in self._tensors)
        table = _table([(t.name, t.kind, t.shape, t.start - start) for t in self._tensors])
        with path.open("rb") as file:
            self._source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._keys = self._source[: self._source[:start].rindex(table)]

    def close(self) -> None:
        """Let go of the unquantized file. Can be called again."""
        self._source.close()

    def write(self, weights: Mapping[str, QuantizedWeight], path: Path) -> None:
        """Write the model with `weights` (layer -> weight); layers that are not named, or kept, as they are.

        Raises `AutoQError` where the file cannot be written; then there is none.
        """
        own = {self._of_layer[name]: weight for name, weight in weights.items() if isinstance(weight, GgufWeight)}
        entries, place = [], 0
        for tensor in self._tensors:
            kind, nbytes = tensor.kind, tensor.nbytes
            if (weight := own.get(tensor.name)) is not None:
                assert isinstance(weight.scheme, Gguf)
                assert weight.shape == tuple(reversed(tensor.shape)), (tensor, weight.shape)
                kind, nbytes = weight.scheme.type, weight.nbytes
            entries.append((tensor.name, kind, tensor.shape, place))
            place += _padded(nbytes)
        head = self._keys + _table(entries)
        try:
            with path.open("wb") as file, memoryview(self._source) as kept:
                file.write(head + bytes(_padded(len(head)) - len(head)))
                for tensor in self._tensors:
                    weight = own.get(tensor.name)
                    stored = kept[tensor.start : tensor.start + tensor.nbytes]
                    written = file.write(
                        stored if weight is None else weight.tensors["blocks"].contiguous().numpy().data
                    )
                    file.write(bytes(_padded(written) - written))
                    stored.release()
        except OSError as problem:
            path.unlink(missing_ok=True)
            raise AutoQError(f"no room for a model file to be timed: {problem.strerror or problem}") from problem


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _table(entries: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The tensor table of a GGUF v3 file, from (name, ggml's name of the type, shape, place) of each."""
    import gguf

    table = bytearray()
    for name, kind, shape, place in entries:
        text = name.encode()
        table += _U64.pack(len(text)) + text + _U32.pack(len(shape)) + b"".join(map(_U64.pack, shape))
        table += _U32.pack(gguf.GGMLQuantizationType[kind.upper()].value) + _U64.pack(place)
    return bytes(table)
