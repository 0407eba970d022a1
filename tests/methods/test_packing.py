"""Bit streams: exact, against Python's own integers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.methods import _packing
from autoq.methods._packing import pack_rows, unpack_rows


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_row_is_one_little_endian_number(bits, rows, count, seed):
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = int.from_bytes(bytes(stream), "little")
        assert number == sum(code << (i * bits) for i, code in enumerate(row))
    assert torch.equal(unpack_rows(packed, bits, count), codes)


def test_three_codes_by_hand():
    assert pack_rows(torch.tensor([[0b101, 0b011, 0b110]], dtype=torch.uint8), 3).tolist() == [[0b10011101, 0b1]]


def test_blocks_do_not_show(monkeypatch):
    codes = torch.randint(0, 8, (11, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = pack_rows(codes, 3)
    monkeypatch.setattr(_packing, "_BLOCK_WORDS", 7)
    assert torch.equal(pack_rows(codes, 3), whole)
    assert torch.equal(unpack_rows(whole, 3, 50), codes)


def test_views_are_read_in_row_order():
    codes = torch.randint(0, 16, (24, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_rows(codes.t(), 4), pack_rows(codes.t().contiguous(), 4))
