"""Rotated checkpoints: the same function, with fewer outliers in weights and activations.

A pre-norm decoder with RMSNorm computes the same outputs if its residual stream x becomes x Q for an orthogonal Q,
what reads it is multiplied by Q and what writes it too (Ashkboos et al., "SliceGPT", 2024, theorem 1): ‖x Q‖ = ‖x‖,
so the norm commutes with Q once its gain g is part of the linears that read it. With Q a randomized Hadamard matrix,
large weights and activations are spread over all channels, and quantization loses less (Ashkboos et al., "QuaRot",
2024). Between values and their output projection, every head is rotated likewise. Only rotations that weights absorb
are made (R1 and R2 of Liu et al., "SpinQuant", 2024), so the model stays what it was to every runtime.

    q, k, gate, up       W diag(g) Q             W (out, in) as stored, y = x Wᵀ; g of the norm before
    v                    Rᵀ W diag(g) Q, Rᵀ b    R (head_dim, head_dim) for each head
    o                    Qᵀ W R, Qᵀ b
    down                 Qᵀ W, Qᵀ b
    embedding            E Q
    head                 W diag(g) Q             g of the last norm
    norms                1

A head that is tied to the embedding cannot stay so: one needs the last norm's gain and the other must not have it,
and as Q does not commute with the gain, keeping it in the norm does not help either. It is untied, and the checkpoint
grows by it: sizes count it like any head of a model.

It is no gain for every model, so it is off by default and `benchmarks/rotation.py` says what it does. Where a channel
carries massive activations (of the first token, say) and the norm's gain for it is next to nothing, the gain shields
every linear from it, and errors of the weights there cost nothing. Folded and rotated, that channel is part of all
inputs, and errors of all weights meet it. SmolLM2-135M is such a model.

The products are float64 and rounded once to the study's dtype. In float32 outputs are the original's to rounding; in
16 bits the rotated weights are rounded anew, and a study's reference is then the rotated model, whose distance from
the original is that of one rounding of all weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from autoq.cache import build_once
from autoq.errors import ModelRefused
from autoq.models._hadamard import Rotation
from autoq.models.sources import PICKLES, WEIGHTS_INDEX, read_json, weight_files

# Decoders whose blocks are exactly those above. Norms of queries and keys (Qwen3) lie behind the rotations.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
VERSION = 1  # part of the cache key: raise it when results change
SEED = 0
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

_BLOCK = re.compile(r"(model\.layers\.\d+\.)(.+)", re.ASCII)
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_UNCHANGED = re.compile(
    r"self_attn\.([qk]_proj\.bias|[qk]_norm\.weight|rotary_emb\.inv_freq)|mlp\.(gate|up)_proj\.bias", re.ASCII
)
_BLOCK_ELEMENTS = 1 << 24  # of an embedding that are float64 at once


def rotated(model_id: str, folder: Path, dtype: str) -> Path:
    """A folder in the cache with the rotated model of the checked `folder`, its floats in `dtype`.

    The copy is known by the path, sizes and times of the weight files. Raises `ModelRefused` for a family that is
    not known to stay the same, for a tensor that has no place in it, and for numbers that are not finite.
    """
    config = read_json(model_id, folder / "config.json")
    known = config.get("architectures") or [None]
    if known[0] not in FAMILIES:
        raise ModelRefused(
            f"model.transform: hadamard rotates {', '.join(FAMILIES)}, and model {model_id!r} is {known[0]}; use none"
        )
    files = weight_files(model_id, folder)
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([facts, config, VERSION, SEED], sort_keys=True).encode()).hexdigest()

    def build(copy: Path) -> None:
        _write(model_id, folder, files, config, dtype, copy)

    return build_once(f"models/hadamard-{key[:32]}-{dtype}", build)


def _write(model_id: str, folder: Path, files: list[Path], config: dict[str, Any], dtype: str, copy: Path) -> None:
    # Imported here: conversion imports this module.
    from autoq.models.conversion import open_weights

    for file in folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".gguf", *PICKLES):
            shutil.copyfile(file, copy / file.name)
    names: dict[str, list[str]] = {}
    norms: dict[str, Tensor] = {}
    for file in files:
        with open_weights(model_id, file) as stored:
            names[file.name] = sorted(stored.keys())
            own = (name for name in names[file.name] if name == LAST_NORM or name.endswith(_NORMS))
            norms |= {name: stored.get_tensor(name).double() for name in own}
    untied = not any(HEAD in own for own in names.values())
    turn = _Turn.of(model_id, config, norms, getattr(torch, dtype))
    for file in files:
        tensors = {}
        with open_weights(model_id, file) as stored:
            for name in names[file.name]:
                tensors[name] = turn(name, stored.get_tensor(name))
                if untied and name == EMBEDDING:
                    tensors[HEAD] = turn(HEAD, stored.get_tensor(name))
        save_file(tensors, copy / file.name, metadata={"format": "pt"})
        names[file.name] = list(tensors)
    if (copy / WEIGHTS_INDEX).is_file():
        index = {"metadata": {}, "weight_map": {name: file for file, own in names.items() for name in own}}
        (copy / WEIGHTS_INDEX).write_text(json.dumps(index), encoding="utf-8")
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class _Turn:
    """What becomes of each tensor of a checkpoint; `gains` are the norms', by name, float64."""

    model_id: str
    gains: Mapping[str, Tensor]
    dtype: torch.dtype
    residual: Rotation
    heads: Rotation

    @classmethod
    def of(cls, model_id: str, config: Mapping[str, Any], gains: Mapping[str, Tensor], dtype: torch.dtype) -> _Turn:
        if LAST_NORM not in gains:
            raise ModelRefused(f"model.transform: model {model_id!r} stores no {LAST_NORM}")
        width = len(gains[LAST_NORM])
        head = config.get("head_dim") or width // int(config["num_attention_heads"])
        return cls(model_id, gains, dtype, Rotation.random(width, SEED), Rotation.random(int(head), SEED + 1))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` of the rotated model. Raises `ModelRefused`."""
        if not tensor.isfinite().all():
            raise ModelRefused(f"model.transform: {name} of model {self.model_id!r} has NaN or infinite numbers")
        found = self._turned(name, tensor)
        if not found.isfinite().all():
            raise ModelRefused(
                f"model.transform: {name} rotated does not fit {self.dtype}; choose model.dtype bfloat16"
            )
        return found.contiguous()

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        if name == EMBEDDING:
            return self._by_rows(tensor, self.residual.apply)
        if name == HEAD:
            return self._by_rows(tensor, lambda rows: self.residual.apply(rows.double() * self.gains[LAST_NORM]))
        place = _BLOCK.fullmatch(name)
        own = place[2] if place else name
        if name == LAST_NORM or own in _NORMS:
            return torch.ones_like(tensor, dtype=self.dtype)
        if place and _UNCHANGED.fullmatch(own):
            return tensor.to(self.dtype)
        change = self._changes(place[1]).get(own) if place else None
        if change is None:
            raise ModelRefused(
                f"model.transform: model {self.model_id!r} has the tensor {name}, whose part is not known"
            )
        return change(tensor.double()).to(self.dtype)

    def _changes(self, block: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """Parameter -> what becomes of it, of the block whose names begin with `block`."""

        def reads(norm: str) -> Callable[[Tensor], Tensor]:
            return lambda weight: self.residual.apply(weight * self.gains[block + norm])

        def writes(weight: Tensor) -> Tensor:
            return self.residual.apply(weight.t()).t() if weight.ndim == 2 else self.residual.apply(weight)

        def heads_in(weight: Tensor) -> Tensor:
            return self.heads.apply(weight.view(len(weight), -1, len(self.heads.signs))).view(weight.shape)

        def heads_out(weight: Tensor) -> Tensor:
            return heads_in(weight.t().contiguous()).t() if weight.ndim == 2 else heads_in(weight.view(1, -1)).view(-1)

        before, after = map(reads, _NORMS)
        return {
            "self_attn.q_proj.weight": before,
            "self_attn.k_proj.weight": before,
            "self_attn.v_proj.weight": lambda weight: heads_out(before(weight)),
            "self_attn.v_proj.bias": heads_out,
            "self_attn.o_proj.weight": lambda weight: writes(heads_in(weight)),
            "self_attn.o_proj.bias": writes,
            "mlp.gate_proj.weight": after,
            "mlp.up_proj.weight": after,
            "mlp.down_proj.weight": writes,
            "mlp.down_proj.bias": writes,
        }

    def _by_rows(self, matrix: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`change` of a matrix too large to be float64 at once."""
        result = torch.empty(matrix.shape, dtype=self.dtype)
        step = max(1, _BLOCK_ELEMENTS // matrix.shape[1])
        for start in range(0, len(matrix), step):
            result[start : start + step] = change(matrix[start : start + step]).to(self.dtype)
        return result
