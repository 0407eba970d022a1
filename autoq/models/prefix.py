"""Prefix reuse: what two assignments have in common before block k is computed once.

A transformer is a chain of blocks, and the hidden states at the input of block k depend on the layers and KV caches
before it alone. They are kept, so an assignment that agrees with an earlier one on all these layers is
evaluated from block k on: the blocks before it give their input back, and block k gets the kept states.
The same operations run on the same numbers, so outputs are equal bit for bit.

Nothing is assumed of an architecture. The chain is the list of modules that holds most of the weights; it
is tried out on a few tokens, and a model whose outputs are not equal then (a second stack, a bias or a
residual that one block hands to others) is evaluated in full each time.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoq.layer import Layer
from autoq.models.loaded import LoadedModel

KEPT_ASSIGNMENTS = 4  # whose states must fit into memory together, or fewer blocks' inputs are kept
_TRIED_TOKENS = 16

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]


class Chain:
    """The blocks of a model in the order in which they run.

    `layers[0]` are the names of the layers before the first block, `layers[1 + k]` those of block k and the name of
    its KV cache. Layers after the last block are in none of them. `costs` has the same places and one more for what
    comes after: weights that a token is multiplied with, as shares of all.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[Sequence[str]], weights: Sequence[int]) -> None:
        self.blocks, self.layers = blocks, layers
        self.costs = [count / max(sum(weights), 1) for count in weights]

    def digests(self, schemes: Mapping[str, str]) -> list[bytes]:
        """For each block what its input depends on: a digest of the schemes of all layers before it."""
        running = hashlib.sha256()
        found = []
        for names in self.layers[:-1]:
            for name in names:
                running.update(f"{name} {schemes.get(name, 'keep')}\n".encode())
            found.append(running.digest())
        return found

    def share(self, start: int) -> float:
        """The share of a forward pass that runs if it starts at block `start`."""
        return 1.0 if start == 0 else 1.0 - sum(self.costs[1 : 1 + start])


class PrefixStates:
    """Runs a model and keeps hidden states at the inputs of blocks, in at most `memory` bytes.

    Those of the assignment that was not used for longest go first, and of these those of its last blocks: what
    comes early is shared by more, and stands in for what comes late. `chain` is None where the model cannot be
    cut; `windows` is how many windows like `sample` (one, with its batch) an assignment is evaluated on.
    """

    def __init__(self, model: LoadedModel, sample: Tensor, windows: int, memory: int) -> None:
        self._model = model
        self._memory = memory
        self._bytes = 0
        # What goes first stands first. Beside the states a digest of the assignment that they were kept for.
        self._kept: collections.OrderedDict[tuple[Hashable, bytes], tuple[Tensor, bytes]] = collections.OrderedDict()
        self.every = 1  # inputs of every so many blocks are kept
        self.chain: Chain | None = None
        with torch.inference_mode():
            self.chain = self._found(sample, windows)

    def _found(self, sample: Tensor, windows: int) -> Chain | None:
        found = cut(self._model, sample)
        if found is None:
            return None
        chain, token_bytes = found
        needed = token_bytes * self._model.length(sample) * windows * KEPT_ASSIGNMENTS
        self.every = -(-needed * (len(chain.blocks) - 1) // max(self._memory, 1))
        return chain if self.every < len(chain.blocks) else None

    def has(self, place: Hashable, schemes: Mapping[str, str]) -> bool:
        """Whether there is nothing to gain by evaluating this assignment there once more."""
        if self.chain is None:
            return True
        digests = self.chain.digests(schemes)
        return all((place, digests[k]) in self._kept for k in self._cuts())

    def _cuts(self) -> range:
        """The blocks whose inputs are kept."""
        assert self.chain is not None
        return range(self.every, len(self.chain.blocks), self.every)

    def outputs(
        self, input_ids: Tensor, place: Hashable, schemes: Mapping[str, str], keep: bool = True
    ) -> tuple[Tensor, float]:
        """The model's outputs as `LoadedModel.outputs`, and the share of a forward pass that this took.

        `place` stands for the tokens and `schemes` (layer -> scheme, but for layers that keep their weights)
        for what is swapped in. With `keep` False nothing new is kept.
        """
        if self.chain is None:
            return self._model.outputs(input_ids), 1.0
        digests = self.chain.digests(schemes)
        cuts = self._cuts()
        start = next((k for k in reversed(cuts) if (place, digests[k]) in self._kept), 0)
        state = self._kept[place, digests[start]][0] if start else None

        def record(k: int, states: Tensor) -> None:
            self._keep(place, digests[k], states, digests[-1])

        self._use(place, digests)
        found = run(self._model, self.chain, input_ids, start, state, cuts if keep else (), record)
        self._use(place, digests)
        return found, self.chain.share(start)

    def _use(self, place: Hashable, digests: Sequence[bytes]) -> None:
        """Let what is kept of an assignment go last, the inputs of its first blocks after all others."""
        for digest in reversed(digests):
            if (place, digest) in self._kept:
                self._kept.move_to_end((place, digest))

    def give_up(self, schemes: Mapping[str, str]) -> None:
        """Nothing will be built on this assignment: states that were kept for it alone are the next to go."""
        if self.chain is None:
            return
        mine = self.chain.digests(schemes)[-1]
        for key in reversed([key for key, (_, owner) in self._kept.items() if owner == mine]):
            self._kept.move_to_end(key, last=False)

    def _keep(self, place: Hashable, digest: bytes, states: Tensor, owner: bytes) -> None:
        if states.nbytes > self._memory or (place, digest) in self._kept:
            return
        self._kept[place, digest] = states, owner
        self._bytes += states.nbytes
        while self._bytes > self._memory:
            _, (oldest, _) = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes


def cut(model: LoadedModel, sample: Tensor) -> tuple[Chain, int] | None:
    """The chain and the bytes of one token's hidden states; None if outputs from a block on are not the whole model's.

    Tried on the first tokens of `sample` (1, tokens), or on an image.
    """
    tried = model.shortened(sample, _TRIED_TOKENS)
    others = tried + 1 if model.info.images is not None else (tried + 1) % model.info.vocab_size
    chain = find_chain(model, tried)
    if chain is None:
        return None
    states: dict[int, Tensor] = {}
    expected = run(model, chain, tried, 0, None, range(len(chain.blocks)), states.__setitem__)
    last = len(chain.blocks) - 1
    for start in {1, (1 + last) // 2, last}:
        # What a block left behind for others is now that of other tokens.
        model.outputs(others)
        for _ in range(2):  # a block that writes to its input would spoil it for the second time
            try:
                found = run(model, chain, tried, start, states[start])
            except Exception:  # whatever a block says to an input that was not meant for it
                return None
            if not torch.equal(found, expected):
                return None
    return chain, states[last].nbytes // model.length(tried)


def run(
    model: LoadedModel,
    chain: Chain,
    input_ids: Tensor,
    start: int,
    state: Tensor | None,
    keep: Sequence[int] = (),
    record: Callable[[int, Tensor], None] = lambda _, __: None,
) -> Tensor:
    """One forward pass from block `start` on its input `state`; `record` gets those of the blocks in `keep`."""
    with contextlib.ExitStack() as stack:
        for k, block in enumerate(chain.blocks):
            if k < start:
                stack.enter_context(_skipped(block))
            elif k == start and state is not None:
                stack.enter_context(_hooked(block, _giving(state)))
            elif k in keep:
                stack.enter_context(_hooked(block, _recording(k, record)))
        return model.outputs(input_ids)


@contextlib.contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """A block that gives its first argument back; the states that flow on are replaced later."""
    block.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        del block.forward


@contextlib.contextmanager
def _hooked(block: nn.Module, hook: Hook) -> Iterator[None]:
    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _giving(state: Tensor) -> Hook:
    return lambda _, inputs: (state, *inputs[1:])


def _recording(k: int, record: Callable[[int, Tensor], None]) -> Hook:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        record(k, inputs[0])

    return hook


def find_chain(model: LoadedModel, input_ids: Tensor) -> Chain | None:
    """The model's chain of blocks, None where there is none.

    Blocks are called once each and in order, take hidden states (1, tokens, width) as their first
    argument and give hidden states of that shape back.
    """
    if model.info.task == "seq2seq":
        return None
    modules = {module: layer for layer in model.info.layers for module in model.modules_of(layer)}
    lists = [list(m) for m in model.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        return None

    def weights(members: list[nn.Module]) -> int:
        return sum(modules[m].parameters for member in members for m in member.modules() if m in modules)

    blocks = max(lists, key=weights)
    if any("forward" in vars(block) for block in blocks):  # somebody else's hand is on them
        return None
    calls: list[tuple[nn.Module, bool]] = []  # a block or a layer's module, and whether hidden states go through it
    with contextlib.ExitStack() as stack:
        for module in dict.fromkeys([*blocks, *modules]):
            handle = module.register_forward_hook(
                lambda module, inputs, output: calls.append((module, bool(inputs) and _alike(inputs[0], output)))
            )
            stack.callback(handle.remove)
        model.outputs(input_ids)
    if [call for call in calls if call[0] in blocks] != [(block, True) for block in blocks]:
        return None
    caches = {model.module_of(cache): cache.name for cache in model.info.caches}
    return _sorted_into(blocks, [module for module, _ in calls], modules, caches)


def _alike(states: Any, output: Any) -> bool:
    return (
        isinstance(states, Tensor)
        and isinstance(output, Tensor)
        and states.dim() == 3
        and states.shape == output.shape
        and states.dtype == output.dtype
    )


def _sorted_into(
    blocks: Sequence[nn.Module],
    called: Sequence[nn.Module],
    modules: Mapping[nn.Module, Layer],
    caches: Mapping[nn.Module, str],
) -> Chain:
    """The chain, with every layer at the first place where it matters."""
    inside = {module: k for k, block in enumerate(blocks) for module in block.modules()}
    last = called.index(blocks[-1])
    after = set(called[last + 1 :]) - set(called[:last])
    first: dict[str, int] = {}
    weights = [0] * (len(blocks) + 2)
    for module, layer in modules.items():
        place = 1 + inside[module] if module in inside else len(blocks) + 1 if module in after else 0
        first[layer.name] = min(place, first.get(layer.name, place))
        if not isinstance(module, nn.Embedding):  # a look-up costs nothing
            weights[place] += round(layer.parameters * layer.reach)
    # A cache that no block holds may matter from the start.
    first |= {name: 1 + inside[module] if module in inside else 0 for module, name in caches.items()}
    names = [[name for name, place in first.items() if place == i] for i in range(len(blocks) + 1)]
    return Chain(blocks, names, weights)
