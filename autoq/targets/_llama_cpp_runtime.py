"""An exported GGUF file, loaded by llama.cpp again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from autoq import device
from autoq.assignment import Assignment
from autoq.errors import AutoQError
from autoq.measurement import Measurement
from autoq.scheme import Gguf, Keep
from autoq.spec import TargetSpec
from autoq.targets import Runtime
from autoq.targets._gguf_file import layer_types
from autoq.targets._gguf_names import FAMILIES
from autoq.targets._llama_cpp_engine import Engine
from autoq.targets._llama_cpp_timing import add, no_samples, prompt
from autoq.targets._torch_cpu_timing import MIN_ROUNDS, STEPS

FILE = "model.gguf"
_CONTEXT = 512
_KEPT = ("f32", "bf16", "f16")


class LlamaCppRuntime(Runtime):
    """`model.gguf` of a folder in llama.cpp on `threads` threads (None: as many as there are cores).

    Raises `AutoQError` for a file that is not there and for one that llama.cpp refuses.
    """

    def __init__(self, folder: Path, threads: int | None, runtime: str) -> None:
        self._path = Path(folder, FILE)
        if not self._path.is_file():
            raise AutoQError(f"there is no {FILE}")
        self._threads = threads or device.threads()
        self._runtime = runtime
        self._context = _CONTEXT
        self._engine = Engine(self._path, self._threads, self._context)

    def differences(self, assignment: Assignment) -> list[str]:
        """See `Runtime.differences`. A kept layer must lie there as floating-point numbers, all kept layers
        as the same: which, the model's dtype says, and no assignment does."""
        found = layer_types(self._path, self._architecture(), assignment)
        kept = Counter(found[name] for name, scheme in assignment.items() if isinstance(scheme, Keep))
        usual = next((kind for kind, _ in kept.most_common() if kind in _KEPT), "f32")
        wanted = {
            name: scheme.type if isinstance(scheme, Gguf) else usual if isinstance(scheme, Keep) else str(scheme)
            for name, scheme in assignment.items()
        }
        return [
            f"{name} is {found[name]} in {FILE}, not {wanted[name]} ({scheme})"
            for name, scheme in assignment.items()
            if found[name] != wanted[name]
        ]

    def _architecture(self) -> str:
        """A transformers class whose tensors are named as those of the file are."""
        from libgguf import inspect as reading

        try:
            entry = reading.inspect_gguf(self._path, max_array_values=0).metadata.get("general.architecture")
        except (OSError, ValueError, OverflowError, MemoryError) as problem:
            raise AutoQError(f"{FILE} cannot be read as GGUF: {problem}") from None
        name = None if entry is None else entry.value
        for architecture, family in FAMILIES.items():
            if family.name == name:
                return architecture
        known = ", ".join(sorted({family.name for family in FAMILIES.values()}))
        raise AutoQError(f"{FILE} holds a model of architecture {name}; choose from {known}")

    def outputs(self, tokens: Tensor) -> Tensor:
        """See `Runtime.outputs`."""
        if tokens.numel() > self._context:
            self._engine.close()
            self._context = tokens.numel()
            self._engine = Engine(self._path, self._threads, self._context)
        return torch.from_numpy(self._engine.logits(tokens.cpu().numpy()))

    def time(self, workload: TargetSpec) -> list[Measurement]:
        """See `Runtime.time`."""
        samples = no_samples()
        ids = prompt(self._engine.vocabulary, workload)
        batch, tokens = ids.shape
        with Engine(self._path, self._threads, tokens + STEPS + 1, batch) as engine:
            engine.round(ids, 2)
            for _ in range(2 * MIN_ROUNDS):
                add(samples, engine.round(ids, STEPS))
        return [
            Measurement(
                phase,
                found.quiet_ms,
                "ms",
                "measured",
                "report",
                stderr=found.stderr_ms,
                n=len(found.wall_ms),
                device=device.fingerprint(),
                detail={"threads": self._threads, "runtime": self._runtime, **found.spread()},
            )
            for phase, found in samples.items()
        ]

    def close(self) -> None:
        self._engine.close()
