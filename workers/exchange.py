"""Quantized layers made once for a study, wherever its workers are.

On one machine the bank's folder is enough. Where a study's workers are on several, a *register* knows which machine has
which entry and who makes one now, and a *shelf* on each machine hands its entries out, in chunks, from the files of
its bank: nothing of them stays in memory. A worker whose bank lacks an entry asks the register. It is told the shelf
that has it, or to make it, or to wait for the one that does; whatever goes wrong (the maker dies, a node leaves, an
entry was removed, a register does not answer), it makes the entry itself, which is always right: entries are known by
what they are made of, and checked by whoever reads them.

Register and shelves take no CPU in Ray's books, belong to one study and end with it.
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoq.cache import cache_dir, entry_path

from .files import CHUNK_BYTES
from .machines import machine

NAMES = 2**18  # that a register remembers, about 50 MB
WAIT_SECONDS = 300.0  # for which one waits for another one to make an entry
LOOK_SECONDS = 0.05
ANSWER_SECONDS = 30.0
_NAME = re.compile(r"[0-9a-f]{40}")


class Answer(NamedTuple):
    """What a register says of an entry: read it from `shelf`, make it, or wait."""

    what: Literal["read", "make", "wait"]
    shelf: Any = None
    machine: str = ""


class Register:
    """An actor: where entries are."""

    def __init__(self) -> None:
        self._shelves: dict[str, Any] = {}
        self._machines: OrderedDict[str, str] = OrderedDict()  # entry -> machine
        self._makers: OrderedDict[str, str] = OrderedDict()  # entry -> worker

    def shelf(self, machine: str, shelf: list[Any]) -> None:
        """A machine has a shelf."""
        self._shelves[machine] = shelf[0]

    def ask(self, name: str, worker: str) -> Answer:
        """Where a worker gets an entry from. One that is told to make it counts as its maker."""
        at = self._machines.get(name)
        if at is not None and at in self._shelves:
            self._machines.move_to_end(name)
            return Answer("read", self._shelves[at], at)
        if self._makers.setdefault(name, worker) == worker:
            self._bound(self._makers)
            return Answer("make")
        return Answer("wait")

    def has(self, name: str, machine: str) -> None:
        """A machine has an entry."""
        self._makers.pop(name, None)
        self._machines[name] = machine
        self._bound(self._machines)

    def lacks(self, name: str, machine: str) -> None:
        """A machine has an entry no more."""
        if self._machines.get(name) == machine:
            del self._machines[name]

    def failed(self, name: str, worker: str) -> None:
        """A worker could not make an entry."""
        if self._makers.get(name) == worker:
            del self._makers[name]

    def gone(self, worker: str) -> None:
        """A worker makes nothing any more."""
        for name in [name for name, maker in self._makers.items() if maker == worker]:
            del self._makers[name]

    @staticmethod
    def _bound(kept: OrderedDict[str, str]) -> None:
        while len(kept) > NAMES:
            kept.popitem(last=False)


class Shelf:
    """An actor: the entries of a machine's bank. `cache` is AUTOQ_CACHE of the study's process, on whose machine `home`
    it holds."""

    def __init__(self, home: str, cache: str | None) -> None:
        if machine() == home:
            os.environ.pop("AUTOQ_CACHE", None)
            if cache is not None:
                os.environ["AUTOQ_CACHE"] = cache

    def read(self, name: str, offset: int) -> bytes | None:
        """At most `CHUNK_BYTES` of an entry; None where it is not there."""
        assert _NAME.fullmatch(name), name
        try:
            with entry_path(cache_dir() / "bank", name).open("rb") as opened:
                opened.seek(offset)
                return opened.read(CHUNK_BYTES)
        except OSError:
            return None


class Neighbours:
    """What a worker's bank asks; see `autoq.bank.Neighbours`."""

    def __init__(self, register: Any, worker: str) -> None:
        self._register, self._worker, self._machine = register, worker, machine()
        self._told: set[str] = set()

    def fetch(self, name: str) -> bytes | None:
        """The content of an entry that another machine has or makes; None: it is to be made here."""
        until = time.monotonic() + WAIT_SECONDS
        while self._register is not None and time.monotonic() < until:
            try:
                asked = self._register.ask.remote(name, self._worker)
                answer: Answer = ray.get(asked, timeout=ANSWER_SECONDS)
            except RayError:
                self._register = None  # the study goes on without it
                break
            if answer.what == "make":
                break
            if answer.what == "wait":
                time.sleep(LOOK_SECONDS)
            elif (content := self._read(answer, name)) is not None:
                return content
            else:
                self._register.lacks.remote(name, answer.machine)
        return None

    def _read(self, answer: Answer, name: str) -> bytes | None:
        if answer.machine != self._machine:
            return _read(answer.shelf, name)
        try:  # another worker of this machine has made it meanwhile
            return entry_path(cache_dir() / "bank", name).read_bytes()
        except OSError:
            return None

    def has(self, name: str) -> None:
        """This machine's bank has an entry."""
        if self._register is not None and name not in self._told:
            self._told.add(name)
            self._register.has.remote(name, self._machine)

    def failed(self, name: str) -> None:
        """An entry that was to be made here was not, or not stored."""
        if self._register is not None:
            self._register.failed.remote(name, self._worker)


def _read(shelf: Any, name: str) -> bytes | None:
    """An entry's content from another machine's shelf; None where it is not there or the shelf cannot be reached."""
    parts: list[bytes] = []
    while not parts or len(parts[-1]) == CHUNK_BYTES:
        try:
            part = ray.get(shelf.read.remote(name, CHUNK_BYTES * len(parts)), timeout=ANSWER_SECONDS)
        except RayError:
            return None
        if part is None:
            return None
        parts.append(part)
    return b"".join(parts)


class Exchange:
    """The executor's side: starts a register once there are two machines, and a shelf on each."""

    def __init__(self) -> None:
        self.register: Any = None
        self._nodes: dict[str, str] = {}
        self._shelves: dict[str, Any] = {}

    def welcome(self, machine_: str, node: str) -> None:
        """There is a worker on a machine, which is Ray's node."""
        self._nodes[machine_] = node
        if len(self._nodes) < 2:
            return
        if self.register is None:
            self.register = ray.remote(Register).options(num_cpus=0, max_restarts=0).remote()
        for name, its_node in self._nodes.items():
            if self._shelves.get(name, (None,))[0] == its_node:
                continue
            where = NodeAffinitySchedulingStrategy(its_node, soft=False)
            options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": where}
            shelf = ray.remote(Shelf).options(**options).remote(machine(), os.environ.get("AUTOQ_CACHE"))
            self._shelves[name] = (its_node, shelf)
            self.register.shelf.remote(name, [shelf])

    def gone(self, worker: str) -> None:
        """A worker has ended."""
        if self.register is not None:
            self.register.gone.remote(worker)

    def close(self) -> None:
        """End register and shelves."""
        for actor in (self.register, *(shelf for _, shelf in self._shelves.values())):
            if actor is not None:
                ray.kill(actor)
        self.register = None
        self._shelves.clear()
