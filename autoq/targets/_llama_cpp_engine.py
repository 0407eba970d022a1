"""llama.cpp itself, in a helper process: logits, and timings taken around its own decode call.

The library is the one inside the wheel of `xllamacpp`, called through its C interface: the wheel's own
Python interface gives out neither logits nor the time of a single step. What runs on the far side is
`_llama_cpp_bridge`; a crash there comes back as one `AutoQError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoq.errors import AutoQError
from autoq.targets._llama_cpp_bridge import SIZES

Array = np.ndarray[Any, np.dtype[Any]]
_LOGIT_TOKENS = 512  # of one request: llama.cpp's own physical batch
_GOODBYE_SECONDS = 10.0


class EngineError(AutoQError):
    """llama.cpp refused a file or a request, or ended."""


@dataclass(frozen=True)
class Round:
    """Nanoseconds, as (wall, CPU summed over threads), of one prefill and of each step after it."""

    prefill: tuple[int, int]
    steps: tuple[tuple[int, int], ...]


def library() -> Path:
    """The shared library of llama.cpp that the package xllamacpp brings. Raises `EngineError`."""
    found = importlib.util.find_spec("xllamacpp")
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        for pattern in ("xllamacpp*.so", "xllamacpp*.pyd", "xllamacpp*.dylib"):
            for path in sorted(Path(folder).glob(pattern)):
                return path
    raise EngineError("llama.cpp is not installed: pip install 'autoq[llama-cpp]' brings the package xllamacpp")


class Engine:
    """One GGUF file in llama.cpp. Use as a context manager, or `close` it.

    `context` is how many tokens each of `sequences` may hold. Raises `EngineError` for a file that
    llama.cpp refuses. Not for use by several threads at once.
    """

    def __init__(self, path: Path, threads: int, context: int, sequences: int = 1) -> None:
        self._file, far = Path(path).name, Path(__file__).with_name("_llama_cpp_bridge.py")
        program = [sys.executable, "-I", str(far), str(library())]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(  # noqa: S603 - our own file, no shell
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # or a failed assertion starts a debugger
        )
        try:
            self.facts = self._ask(
                {"do": "open", "path": str(path), "threads": threads, "context": context, "sequences": sequences}
            )
        except BaseException:
            self.close()
            raise
        self.context, self._sequences = context, sequences

    @property
    def closed(self) -> bool:
        """Whether the helper process has ended, or was told to."""
        return self._process is None or self._process.poll() is not None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self.facts["vocabulary"])

    def logits(self, tokens: Sequence[int] | Array) -> Array:
        """Logits (n, vocabulary) float32 of `tokens` (n,), read from the start in a fresh cache."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        assert ids.ndim == 1 and ids.size
        if ids.size > self.context:
            raise EngineError(f"{ids.size} tokens do not fit into a context of {self.context}")
        found = np.empty((ids.size, self.vocabulary), dtype=np.float32)
        for start in range(0, ids.size, _LOGIT_TOKENS):
            rows = slice(start, min(start + _LOGIT_TOKENS, ids.size))
            self._ask({"do": "logits", "first": start == 0}, ids[rows], found[rows])
        return found

    def round(self, prompt: Array, steps: int) -> Round:
        """Time one prefill of `prompt` (batch, tokens), then `steps` of one token for each sequence.

        Only the last position of each sequence has its logits computed, as generation needs it.
        """
        ids = np.ascontiguousarray(prompt, dtype=np.int32)
        assert ids.ndim == 2 and len(ids) <= self._sequences and ids.shape[1] + steps <= self.context
        taken = self._ask({"do": "round", "batch": len(ids), "steps": steps}, ids)
        wall, cpu = taken["prefill"]
        return Round((wall, cpu), tuple((wall, cpu) for wall, cpu in taken["steps"]))

    def close(self) -> None:
        """End the helper process and wait until it has. Can be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            self._complaints.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], payload: Array | None = None, into: Array | None = None) -> dict[str, Any]:
        """Send a request and read its reply; the reply's bytes go to `into`, whose size they must have."""
        process = self._process
        if process is None:
            raise EngineError(f"llama.cpp with {self._file} was closed")
        assert process.stdin is not None and process.stdout is not None
        text = json.dumps(request).encode()
        raw = b"" if payload is None else payload.tobytes()
        try:
            process.stdin.write(SIZES.pack(len(text), len(raw)) + text + raw)
            process.stdin.flush()
            header, size = SIZES.unpack(self._read(SIZES.size))
            reply: dict[str, Any] = json.loads(self._read(header))
            expected = 0 if into is None or "error" in reply else into.nbytes
            assert size == expected, (size, expected)
            if into is not None and expected:
                self._read_into(memoryview(into.reshape(-1).view(np.uint8).data))
        except OSError:
            raise self._obituary() from None
        except EngineError:
            raise
        except BaseException:
            # Interrupted halfway, the next reply would be that of this request.
            process.kill()
            self.close()
            raise
        if "error" in reply:
            raise EngineError(f"llama.cpp with {self._file}: {reply['error']}")
        return reply

    def _read(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._read_into(memoryview(buffer))
        return buffer

    def _read_into(self, view: memoryview) -> None:
        assert self._process is not None and self._process.stdout is not None
        while view:
            got = self._process.stdout.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise self._obituary()
            view = view[got:]

    def _obituary(self) -> EngineError:
        """How the helper process ended, and the last thing that it said."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(_GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._complaints.seek(0)
        said = [
            line.strip() for line in self._complaints.read().decode("utf-8", "replace").splitlines() if line.strip()
        ]
        self.close()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return EngineError(f"llama.cpp with {self._file} ended {how}" + (f": {said[-1][:300]}" if said else ""))
