"""The far side of `_llama_cpp_engine`: a program of its own that holds one model in llama.cpp's library.

llama.cpp ends its process on a failed assertion, brings its own OpenMP, and keeps what it maps; none of
that belongs into a process that searches. So this file is run as a script, in isolation: it imports the
standard library alone, takes the path of the shared library as its argument, answers requests from its
standard input until that ends, and so never outlives who started it.

A message is two sizes (4 and 8 bytes, little endian), a JSON object of the first size and raw bytes of
the second. A request names its action in `do`; a reply has `error`, one line, where it went wrong.

    open    path, threads, context, sequences   ->  vocabulary, context, system
    logits  first; int32 tokens (n,)            ->  float32 (n, vocabulary); `first` empties the cache
    round   batch, steps; int32 (batch, prompt) ->  prefill [wall, cpu] and steps [[wall, cpu] …] in ns

llama.cpp's parameters travel by value in structs that change with its version. They are passed here as
opaque memory, larger than any version needs, filled in by the library itself; of their fields only two
are written, after their defaults were found where they are expected (include/llama.h, `n_ctx`, `n_batch`,
`n_ubatch`, `n_seq_max`).
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import struct
import sys
import time
from typing import Any, BinaryIO

SIZES = struct.Struct("<IQ")
CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
BATCH = CONTEXT_DEFAULTS[1]  # tokens that one call may hold
_ERROR, _CONTINUED = 4, 5  # ggml_log_level


class Refused(Exception):
    """What the near side is told in one line."""


class _Opaque(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * 512)]


class _Batch(ctypes.Structure):
    """`llama_batch` of include/llama.h."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

# name -> result, arguments
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG, ctypes.c_void_p),
    "llama_print_system_info": (ctypes.c_char_p,),
    "llama_model_default_params": (_Opaque,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, _Opaque),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_context_default_params": (_Opaque,),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, _Opaque),
    "llama_n_ctx_seq": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_set_n_threads": (None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_batch_init": (_Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, _Batch),
    "llama_synchronize": (None, ctypes.c_void_p),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p),
}


class Session:
    """One model and one context of llama.cpp."""

    def __init__(self, library: str) -> None:
        loaded = ctypes.CDLL(library)
        for name, (result, *arguments) in _FUNCTIONS.items():
            try:
                function = getattr(loaded, name)
            except AttributeError:
                raise Refused(f"its library has no function {name}") from None
            function.restype, function.argtypes = result, arguments
        self._library: Any = loaded
        self._complaints: collections.deque[str] = collections.deque(maxlen=8)
        self._log = _LOG(self._note)  # must live as long as the library calls it
        self._loud = False
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()
        self._model: int | None = None
        self._context: int | None = None
        self._batch: Any = None
        self._vocabulary = self._past = 0

    def _note(self, level: int, text: bytes | None, _: Any) -> None:
        if level != _CONTINUED:
            self._loud = level >= _ERROR
        if self._loud and text and text.strip():
            self._complaints.append(text.decode("utf-8", "replace").strip())

    def _refusal(self, what: str) -> Refused:
        said = "; ".join(" ".join(line.split()) for line in self._complaints)
        return Refused(f"{what}: {said}" if said else what)

    def open(self, path: str, threads: int, context: int, sequences: int) -> dict[str, Any]:
        """Load the model of a file and make a context of `context` tokens for each of `sequences`."""
        parameters = self._library.llama_context_default_params()
        if tuple(parameters.words[: len(CONTEXT_DEFAULTS)]) != CONTEXT_DEFAULTS:
            found = ", ".join(map(str, parameters.words[: len(CONTEXT_DEFAULTS)]))
            raise Refused(f"its llama_context_params begin with {found}, not with {CONTEXT_DEFAULTS}: unknown layout")
        self._complaints.clear()
        defaults = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), defaults)
        if not self._model:
            raise self._refusal("it cannot load the file")
        parameters.words[0], parameters.words[3] = context * sequences, sequences
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise self._refusal(f"it cannot make a context of {context} tokens")
        reached = self._library.llama_n_ctx_seq(self._context)
        if reached < context:
            raise Refused(f"it made a context of {reached} tokens where {context} were asked for")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        system = self._library.llama_print_system_info().decode("utf-8", "replace")
        return {"vocabulary": self._vocabulary, "context": reached, "system": system}

    def _fill(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Put (token, position, sequence, whether its logits are wanted) of each token into the batch."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted

    def _decode(self) -> tuple[int, int]:
        """Nanoseconds of wall time, and of CPU time summed over threads, that the batch took."""
        self._complaints.clear()
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        status = self._library.llama_decode(self._context, self._batch)
        self._library.llama_synchronize(self._context)
        spent = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        if status:
            raise self._refusal(f"llama_decode ended with {status}")
        return spent

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def logits(self, tokens: list[int], first: bool) -> tuple[dict[str, Any], Any]:
        """The logits of every one of `tokens`, which follow those of the calls before unless `first`."""
        if first:
            self._forget()
        self._fill([(token, self._past + index, 0, True) for index, token in enumerate(tokens)])
        self._decode()
        self._past += len(tokens)
        found = self._library.llama_get_logits(self._context)
        floats = (ctypes.c_float * (len(tokens) * self._vocabulary)).from_address(ctypes.addressof(found.contents))
        return {}, memoryview(floats).cast("B")

    def round(self, tokens: list[int], batch: int, steps: int) -> dict[str, Any]:
        """Time one prefill of `tokens` (batch, prompt), then `steps` of one token for each sequence."""
        self._forget()
        prompt = len(tokens) // batch
        entries = [
            (tokens[sequence * prompt + position], position, sequence, position == prompt - 1)
            for sequence in range(batch)
            for position in range(prompt)
        ]
        wall = cpu = 0
        for start in range(0, len(entries), BATCH):
            self._fill(entries[start : start + BATCH])
            spent = self._decode()
            wall, cpu = wall + spent[0], cpu + spent[1]
        taken = []
        for step in range(steps):
            self._fill([(tokens[step % len(tokens)], prompt + step, sequence, True) for sequence in range(batch)])
            taken.append(self._decode())
        return {"prefill": [wall, cpu], "steps": taken}


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None where the stream has ended."""
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    header, payload = SIZES.unpack(sizes)
    return json.loads(stream.read(header)), stream.read(payload)


def send(stream: BinaryIO, header: dict[str, Any], payload: Any = b"") -> None:
    """Write one message."""
    text = json.dumps(header).encode()
    stream.write(SIZES.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def _answer(session: Session, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], Any]:
    tokens = memoryview(payload).cast("i").tolist()
    action = request.pop("do")
    if action == "open":
        return session.open(**request), b""
    if action == "logits":
        return session.logits(tokens, **request)
    assert action == "round", action
    return session.round(tokens, **request), b""


def main(library: str) -> None:
    """Answer requests until the standard input ends."""
    # The library may print; what it prints must not end up between messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session: Session | None = None
    while (message := receive(sys.stdin.buffer)) is not None:
        try:
            session = session or Session(library)
            send(replies, *_answer(session, *message))
        except (Refused, OSError) as problem:
            send(replies, {"error": " ".join(str(problem).split())})


if __name__ == "__main__":
    main(sys.argv[1])
