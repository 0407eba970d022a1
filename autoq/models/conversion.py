"""Conversions that are done once and kept in the user's cache: GGUF to safetensors, and number formats.

Workers of one machine read a model by mapping its safetensors file into memory, so they share one
copy. That works only for a file that holds the numbers in the format that the study asks for; another
format would be converted in every process, into memory of its own. So the conversion is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoq.cache import build_once
from autoq.errors import AutoQError, ModelRefused
from autoq.models.rotation import rotated
from autoq.models.sources import PICKLES, resolve, weight_files
from autoq.spec import ModelSpec

_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def safetensors_folder(spec: ModelSpec) -> Path:
    """The folder that holds the model's config and safetensors; a GGUF file is converted first.

    This is the model as the study sees it: transformed, if the spec says so.
    """
    found = resolve(spec)
    if found.is_file():
        found = from_gguf(found, spec.dtype)
    return rotated(spec.id, found, spec.dtype) if spec.transform == "hadamard" else found


def from_gguf(file: Path, dtype: str) -> Path:
    """A folder with the dequantized model of a GGUF file as safetensors of `dtype`, and its tokenizer.

    Values are dequantized in float32 and rounded once. The folder's name is the file's SHA-256.
    Raises `ModelRefused` for a file that transformers cannot read.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise AutoQError(f"model {str(file)!r} is GGUF, which needs {package}: pip install 'autoq[gguf]'")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()

    def build(folder: Path) -> None:
        # transformers looks at the neighbours of a GGUF file (an adapter's config, say): give it none.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            try:
                # The progress bar of the conversion has no switch.
                with contextlib.redirect_stderr(io.StringIO()):
                    _convert_gguf(Path(alone), "model.gguf", dtype, folder)
            except Exception as problem:
                # gguf, transformers and tokenizers raise whatever they meet in a file of a foreign format.
                line = str(problem).partition("\n")[0] or type(problem).__name__
                raise ModelRefused(f"model {str(file)!r} cannot be read as GGUF: {line}") from problem

    return build_once(f"models/gguf-{digest[:32]}-{dtype}", build)


def _convert_gguf(source: Path, name: str, dtype: str, folder: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        source, gguf_file=name, trust_remote_code=False, local_files_only=True
    )
    # The weights are plain numbers now; what remembers the GGUF quantization would be saved with them.
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recast(model_id: str, folder: Path, dtype: str) -> Path:
    """The folder itself if its floats are all of `dtype`, else a copy in the cache where they are.

    The copy is known by the path, sizes and times of the weight files. Raises `ModelRefused` for
    files that are not safetensors, and where a finite value would become infinite.
    """
    files = weight_files(model_id, folder)
    if all(_stored_formats(model_id, file) <= {_NAMES[dtype]} for file in files):
        return folder
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def build(copy: Path) -> None:
        for file in files:
            _recast_file(model_id, file, getattr(torch, dtype), copy / file.name)
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".gguf", *PICKLES):
                shutil.copyfile(file, copy / file.name)

    return build_once(f"models/cast-{key[:32]}-{dtype}", build)


def _stored_formats(model_id: str, file: Path) -> set[str]:
    """The float formats in a safetensors file, as its header names them."""
    with open_weights(model_id, file) as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()} & _FLOATS  # noqa: SIM118


def are_equal(model_id: str, folder: Path, a: str, b: str) -> bool:
    """Whether the checkpoint stores the tensors `a` and `b` as equal, or only one of them.

    Nothing but the files' headers is read unless both are there. A checkpoint of a bare model may
    leave out the first part of the names.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(model_id, folder):
        with open_weights(model_id, file) as opened:
            stored = set(opened.keys())
            for name in (a, b):
                known = next((known for known in (name, name.partition(".")[2]) if known in stored), None)
                if known is not None:
                    found[name] = opened.get_tensor(known)
    return len(found) < 2 or torch.equal(found[a], found[b])


@contextlib.contextmanager
def open_weights(model_id: str, file: Path) -> Iterator[Any]:
    """A safetensors file, opened. Raises `ModelRefused` for one that is not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as problem:
        line = " ".join(str(problem).split())[:300]  # it quotes the file
        raise ModelRefused(f"model {model_id!r}: {file.name} is not a whole safetensors file: {line}") from None


def _recast_file(model_id: str, file: Path, dtype: torch.dtype, target: Path) -> None:
    tensors = {}
    with open_weights(model_id, file) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            tensor = opened.get_tensor(name)
            if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                cast = tensor.to(dtype)
                if bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
                    raise ModelRefused(f"model {model_id!r}: {name} does not fit {dtype}; choose model.dtype bfloat16")
                tensor = cast
            tensors[name] = tensor.contiguous()
    save_file(tensors, target, metadata={"format": "pt"})
