"""A compressed-tensors checkpoint loaded by transformers' own support for it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autoq.assignment import Assignment
from autoq.errors import AutoQError
from autoq.models.inspection import first_line
from autoq.models.quiet import quiet
from autoq.scheme import Float, Integer
from autoq.targets import Runtime
from autoq.targets._compressed_tensors import expected
from autoq.targets._compressed_tensors_config import layouts
from autoq.targets._vllm_rules import layout

_DTYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}


class CompressedTensorsRuntime(Runtime):
    """The model as transformers loads it: packed weights are decompressed, inputs rounded on the fly.

    Raises `AutoQError` for files that transformers refuses, or fills up with random numbers.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.folder = folder
        if threads is not None:
            torch.set_num_threads(threads)
        with _silent():
            try:
                model, report = transformers.AutoModelForCausalLM.from_pretrained(
                    folder,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # all faults are refused below, by name
                    output_loading_info=True,
                )
                _put_zero_points(model, folder, report["mismatched_keys"])
                _refuse_faults(folder, report)
                self.model: Any = model.eval()
                self.outputs(torch.zeros(1, dtype=torch.int64))  # the first pass decompresses the weights
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
                raise AutoQError(f"transformers does not load {str(folder)!r}: {first_line(problem)}") from problem

    def outputs(self, tokens: Tensor) -> Tensor:
        """See `Runtime.outputs`."""
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0]
        return logits.float()

    def differences(self, assignment: Assignment) -> list[str]:
        """See `Runtime.differences`: by `config_groups` and the tensors' headers."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        modules = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
        found = layouts(config, {name: type(module).__name__ for name, module in modules.items()})
        headers = self._headers()
        lines = [f"{name}: no such layer in the files" for name in assignment if name not in modules]
        for name, text in found.items():
            scheme = assignment.get(name)
            wanted = "keep" if scheme is None else layout(scheme)
            if text != wanted:
                lines.append(f"{name}: {text} in the files, {wanted} in the assignment")
            elif isinstance(scheme, Integer | Float):
                lines += self._wrong_tensors(name, scheme, modules[name], headers)
        return lines

    def _wrong_tensors(
        self, name: str, scheme: Integer | Float, module: Any, headers: dict[str, tuple[Any, tuple[int, ...]]]
    ) -> list[str]:
        shape = (module.out_features, module.in_features)
        wanted = {f"{name}.{part}": each for part, each in expected(scheme, shape).items()}
        present = {key: each for key, each in headers.items() if key.startswith(f"{name}.") and key != f"{name}.bias"}
        if present == wanted:
            return []
        keys = sorted(key for key in {*present, *wanted} if present.get(key) != wanted.get(key))
        return [f"{key}: {present.get(key)} in the files, {wanted.get(key)} for {scheme}" for key in keys]

    def _headers(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape), over all files."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(key)
                    found[key] = (_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
        return found

    def close(self) -> None:
        """See `Runtime.close`."""
        self.model = None


def _put_zero_points(model: Any, folder: Path, mismatched: set[Any]) -> None:
    """Put packed zero points where they belong, and take them off the list of faults.

    Building a model without storage, compressed-tensors (0.15 to 0.20) packs weights but not their zero
    points (`PackedQuantizationCompressor.compress`), so transformers makes room for unpacked ones and
    finds the files' too small. Decompression itself reads packed ones, as vLLM does.
    """
    for entry in list(mismatched):
        key = entry if isinstance(entry, str) else entry[0]
        module, _, part = key.rpartition(".")
        if part == "weight_zero_point":
            tensor = _read(folder, key)
            setattr(model.get_submodule(module), part, nn.Parameter(tensor, requires_grad=False))
            mismatched.discard(entry)


def _read(folder: Path, key: str) -> Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118 - not a dict
                tensor: Tensor = file.get_tensor(key)
                return tensor
    raise KeyError(key)


def _refuse_faults(folder: Path, report: dict[str, Any]) -> None:
    """Raise for tensors that the files lack, have in another shape, or have for no layer."""
    faults = {"missing": "lacks", "mismatched": "has in another shape", "unexpected": "has no place for"}
    for what, told in faults.items():
        if found := sorted(key if isinstance(key, str) else key[0] for key in report[f"{what}_keys"]):
            raise AutoQError(f"{str(folder)!r} {told} {len(found)} of its tensors, the first being {found[0]}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Neither progress bars nor log lines of transformers and compressed-tensors: what goes wrong is raised."""
    logger.disable("compressed_tensors")
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
