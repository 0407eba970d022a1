"""Quantized KV caches against a cache that is really stored as codes and filled token by token, and by properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from autoq.kv_cache import BITS, GROUP, KeyValue
from autoq.models import inspect, load
from autoq.models.caches import dequantized, encode, grid, read, read_keys
from autoq.models.loaded import LoadedModel
from autoq.scheme import Keep
from autoq.spec import ModelSpec

CLOSE = 2e-6  # some architectures take the softmax in float32 whatever the model is in
DECODERS = ["llama", "qwen3", "gemma2", "phi3", "mixtral", "gpt-oss", "gpt2", "gpt-neox", "opt"]
OTHERS = ["bert", "bert-mlm", "bert-classifier", "llama-classifier", "t5", "bart"]


class Coded:
    """Rows of numbers as a runtime would store them: packed codes, and a scale and a zero in 16 bits each."""

    def __init__(self, rows: np.ndarray, bits: int) -> None:
        self.bits, self.count = bits, rows.shape[-1]
        low, high = rows.min(-1), rows.max(-1)
        self.zero = self._bfloat16(low, down=True)
        step = high / np.float32(2**bits - 1) - self._wide(self.zero) / np.float32(2**bits - 1)
        self.scale = self._bfloat16(np.maximum(step, np.float32(2.0**-126)), down=False)
        scale, zero = self._wide(self.scale)[..., None], self._wide(self.zero)[..., None]
        codes = np.clip(np.rint((rows - zero) / scale), 0, 2**bits - 1).astype(np.uint8)
        bit_rows = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
        self.packed = np.packbits(bit_rows.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")

    @staticmethod
    def _bfloat16(x: np.ndarray, down: bool) -> np.ndarray:
        """The upper 16 bits of float32 numbers, rounded down or up."""
        words = x.astype(np.float32).view(np.uint32)
        away = (words >> 31 == 1) == down  # whether the magnitude is to grow
        return ((words + np.where(away, 0xFFFF, 0).astype(np.uint32)) >> 16).astype(np.uint16)

    @staticmethod
    def _wide(halves: np.ndarray) -> np.ndarray:
        return (halves.astype(np.uint32) << 16).view(np.float32)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes

    def numbers(self) -> np.ndarray:
        bits = np.unpackbits(self.packed, axis=-1, bitorder="little")[..., : self.count * self.bits]
        codes = np.packbits(bits.reshape(*bits.shape[:-1], self.count, self.bits), axis=-1, bitorder="little")[..., 0]
        return codes.astype(np.float32) * self._wide(self.scale)[..., None] + self._wide(self.zero)[..., None]


class StoredCache(DynamicCache):
    """A cache of transformers that keeps codes, one step at a time, and hands out what it holds.

    Written from the paper, not from the code under test.
    """

    def __init__(self, bits: dict[int, int]) -> None:
        super().__init__()
        self.bits = bits  # index of a block -> width
        self.groups: dict[int, list[Coded]] = {block: [] for block in bits}
        self.tails: dict[int, list[torch.Tensor]] = {block: [] for block in bits}
        self.values: dict[int, list[Coded]] = {block: [] for block in bits}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        plain = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.bits:
            return plain
        bits = self.bits[layer_idx]
        assert key_states.shape[:3:2] == (1, 1)  # one sequence, one token
        tail, groups = self.tails[layer_idx], self.groups[layer_idx]
        tail.append(key_states)
        if len(tail) == 32:  # (heads, width, 32): a row per channel
            groups.append(Coded(torch.cat(tail, 2)[0].transpose(1, 2).float().contiguous().numpy(), bits))
            tail.clear()
        self.values[layer_idx].append(Coded(value_states[0, :, 0].float().numpy(), bits))
        keys = [torch.from_numpy(g.numbers()).transpose(1, 2)[None].to(key_states.dtype) for g in groups] + tail
        values = [torch.from_numpy(v.numbers())[None, :, None].to(value_states.dtype) for v in self.values[layer_idx]]
        return torch.cat(keys, 2), torch.cat(values, 2)

    def nbytes(self, block: int, dtype_bytes: int) -> int:
        coded = sum(part.nbytes for part in (*self.groups[block], *self.values[block]))
        return coded + sum(key.numel() for key in self.tails[block]) * dtype_bytes


def loaded(folder) -> LoadedModel:
    """In float64, where a sum in another order moves no code."""
    model = load(ModelSpec(id=str(folder), dtype="float32"), "cpu")
    return LoadedModel(model.model.double(), model.tokenizer, model.info)


def tokens(model: LoadedModel, count: int) -> torch.Tensor:
    return torch.randint(4, 260, (1, count), generator=torch.Generator().manual_seed(3))


def coded(model: LoadedModel, bits: int, which=slice(None)):
    return {cache.name: read(bits) for cache in model.info.caches[which]}


@torch.inference_mode()
def step_by_step(model: LoadedModel, ids: torch.Tensor, cache: StoredCache) -> torch.Tensor:
    steps = [
        model.model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(ids.shape[1])
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("bits", [8, 2])
def test_one_pass_gives_the_logits_of_a_coded_cache_that_is_filled_token_by_token(family, bits, tiny_model_dir):
    model = loaded(tiny_model_dir(family))
    ids = tokens(model, 64 if family in ("gpt2", "gpt-neox", "opt") else 83)
    stored = StoredCache({0: bits})
    expected = step_by_step(model, ids, stored)
    model.swap({}, caches=coded(model, bits, slice(1)))
    with torch.inference_mode():
        found = model.outputs(ids)
        model.restore()
        plain = model.outputs(ids)
    assert (found - expected).abs().max() < CLOSE
    assert (found - plain).abs().max() > 20 * CLOSE
    # What the oracle holds is what is counted, were its numbers of the model's own width.
    cache = model.info.caches[0]
    if cache.window is None:
        assert stored.nbytes(0, 4) == cache.nbytes(KeyValue(bits), ids.shape[1])


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_all_blocks_at_different_widths(family, tiny_model_dir):
    model = loaded(tiny_model_dir(family))
    ids = tokens(model, 64)
    expected = step_by_step(model, ids, StoredCache({0: 4, 1: 2}))
    first, second = (cache.name for cache in model.info.caches)
    model.swap({}, caches={first: read(4), second: read(2)})
    with torch.inference_mode():
        assert (model.outputs(ids) - expected).abs().max() < CLOSE


def test_a_prompt_in_one_pass_and_then_tokens_one_by_one(tiny_model_dir):
    """As generation runs: the runtime's own cache holds everything, and attention reads it as codes."""
    model = loaded(tiny_model_dir("llama"))
    ids = tokens(model, 80)
    model.swap({}, caches=coded(model, 4))
    with torch.inference_mode():
        whole = model.outputs(ids)
        own = DynamicCache()
        parts = [model.model(input_ids=ids[:, :45], past_key_values=own, use_cache=True).logits]
        parts += [
            model.model(input_ids=ids[:, i : i + 1], past_key_values=own, use_cache=True).logits for i in range(45, 80)
        ]
    assert (torch.cat(parts, 1) - whole).abs().max() < CLOSE


@pytest.mark.parametrize("family", DECODERS)
def test_caches_are_those_that_transformers_fills(family, tiny_model_dir):
    spec = ModelSpec(id=str(tiny_model_dir(family)))
    info, model = inspect(spec), load(spec, "cpu")
    held = DynamicCache()
    with torch.inference_mode():
        model.model(input_ids=tokens(model, 12), past_key_values=held, use_cache=True)
    assert len(info.caches) == len(held.layers) == 2
    for block, (cache, layer) in enumerate(zip(info.caches, held.layers, strict=True)):
        assert layer.keys.shape == (1, cache.heads, 12, cache.key_width)
        assert layer.values.shape == (1, cache.heads, 12, cache.value_width)
        assert cache.nbytes(Keep(), 12) == layer.keys.nbytes + layer.values.nbytes
        assert cache.block == block
        assert cache.window == {"gpt-oss": [16, None], "gemma2": [4096, None]}.get(family, [None, None])[block]


@pytest.mark.parametrize("family", OTHERS)
def test_what_is_no_causal_decoder_has_none(family, tiny_model_dir):
    assert inspect(ModelSpec(id=str(tiny_model_dir(family)))).caches == ()


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_that_is_read_as_it_is_changes_nothing_and_restoring_leaves_no_trace(family, tiny_model_dir):
    model = load(ModelSpec(id=str(tiny_model_dir(family))), "cpu")
    ids = tokens(model, 40)
    with torch.inference_mode():
        before = model.outputs(ids)
        model.swap({}, caches={cache.name: lambda keys, values: (keys, values) for cache in model.info.caches})
        torch.testing.assert_close(model.outputs(ids), before, rtol=0, atol=0.01)
        model.swap({}, caches=coded(model, 2))
        assert not torch.equal(model.outputs(ids), before)
        model.restore()
        assert torch.equal(model.outputs(ids), before)


def test_an_unknown_cache_changes_nothing(tiny_model_dir):
    model = load(ModelSpec(id=str(tiny_model_dir("llama"))), "cpu")
    model.swap({}, caches=coded(model, 2))
    with pytest.raises(KeyError):
        model.swap({}, caches={"model.layers.0.mlp": read(2)})
    assert all(hasattr(model.model.get_submodule(cache.name), "autoq_cache") for cache in model.info.caches)


def test_a_position_reads_nothing_of_later_ones(tiny_model_dir):
    """Codes of a group depend on all of its tokens: they must not be seen before it is whole."""
    model = loaded(tiny_model_dir("llama"))
    ids = tokens(model, 96)
    model.swap({}, caches=coded(model, 2))
    with torch.inference_mode():
        whole = model.outputs(ids)
        for count in (1, 31, 32, 33, 63, 64, 95):
            assert (model.outputs(ids[:, :count]) - whole[:, :count]).abs().max() < CLOSE


def test_a_window_shorter_than_a_group_rounds_values_alone(tiny_model_dir):
    keys, values = torch.randn(2, 1, 2, GROUP - 1, 8).unbind()
    found = read(4)(keys, values)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], dequantized(values, 4))


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.sampled_from(BITS))
def test_no_number_moves_by_more_than_half_a_step(row, bits):
    x = torch.tensor(row)
    scale, zero = grid(x, bits)
    for parameter in (scale, zero):
        assert torch.equal(parameter.to(torch.bfloat16).float(), parameter)
    codes = encode(x, scale, zero, bits)
    assert torch.equal(codes, codes.round())
    assert 0 <= codes.min() <= codes.max() <= 2**bits - 1
    error = (dequantized(x, bits).double() - x.double()).abs()
    rounding = 2.0**-22 * (x.abs().double() + zero.abs().double() + (2**bits - 1) * scale.double())
    assert (error <= 0.5 * scale.double() + rounding).all()
    # A step is no longer than the range asks for, but for what bfloat16 rounds of its ends.
    span = x.double().max() - x.double().min() + 2.0**-7 * x.double().abs().max()
    assert float(scale) <= 1.01 * float(span) / (2**bits - 1) + 2.0**-125


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_more_bits_lose_less(seed, spread, shift):
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(seed)) * spread + shift
    for function in (read_keys, dequantized):
        errors = [float((function(x, bits) - x).square().sum()) for bits in sorted(BITS)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("constant", [0.0, 0.75, -3e38, 1e-40, -1e-30])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_comes_back_to_bfloat16_precision(constant, bits):
    x = torch.full((1, 1, 32, 8), constant)
    for function in (read_keys, dequantized):
        back = function(x, bits)
        assert back.isfinite().all()
        assert ((back - x).abs() <= 2.0**-8 * abs(constant) + 2.0**-126).all()
    assert torch.equal(dequantized(torch.zeros(3, 8), bits), torch.zeros(3, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(2, 8)
    x[0, 3] = bad
    for bits in BITS:
        back = dequantized(x, bits)
        assert not back[0].isfinite().all()
        assert torch.equal(back[1], x[1])


def test_outliers_of_a_channel_spoil_that_channel_alone():
    """Why keys are coded per channel: KIVI's figure 2."""
    keys = torch.randn(1, 1, GROUP, 16, generator=torch.Generator().manual_seed(0))
    keys[..., 5] *= 100
    error = (read_keys(keys, 4) - keys).abs().amax(2)[0, 0]
    others = [i for i in range(16) if i != 5]
    assert error[others].max() < 0.25
    assert (dequantized(keys, 4) - keys).abs().amax(2)[0, 0][others].median() > 0.4


def test_gradients_pass_as_if_nothing_had_been_rounded(tiny_model_dir):
    keys, values = (torch.randn(1, 1, 40, 8, requires_grad=True) for _ in range(2))
    found = read(2)(keys, values)
    with torch.no_grad():
        exact = read(2)(keys, values)
    assert torch.equal(found[0], exact[0])
    assert torch.equal(found[1], exact[1])
    (found[0].sum() + 2 * found[1].sum()).backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    assert torch.equal(values.grad, torch.full_like(values, 2))
