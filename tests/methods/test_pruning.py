"""Pruning: by hand, against rules written out a second time, and against compressed-tensors' 2:4 code."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.utils import pack_bitmasks, unpack_bitmasks
from compressed_tensors.utils.semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.errors import SchemeRefused
from autoq.layer import Layer
from autoq.methods import Grid, Method
from autoq.methods._sparse_weight import SparseWeight
from autoq.methods._weights import expected_tensors, restore
from autoq.scheme import PerChannel, PerGroup, Sparse, parse_scheme
from autoq.sparsity import TwoOfFour, Unstructured

RTN, MAGNITUDE, WANDA = (plugins.load("methods", name, Method) for name in ("rtn", "magnitude", "wanda"))
TEXTS = ("24", "50", "70", "24-int4-g16", "24-int3-channel-sym", "50-int4-g16-sym", "30-int2-g32", "90-int8-tensor")


def weight(shape=(24, 96), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def moments(columns=96, seed=1):
    """E[x²] over four decades, as a transformer's are."""
    return {"input_mean_square": 10 ** (torch.rand(columns, generator=torch.Generator().manual_seed(seed)) * 4 - 2)}


def pruned(method, w, text, statistics=None) -> SparseWeight:
    found = plugins.load("methods", method, Method).quantize(w, parse_scheme(method + text), statistics)
    assert isinstance(found, SparseWeight)
    return found


def test_two_by_eight_by_hand():
    """Of each four the two largest stay: bits 0, 2 and 4, 7; bits 2, 3 and 5, 6. With equal weights the later one."""
    w = torch.tensor([[3.0, -1, 2, 0.5, -8, 1, 0, 7], [1.0, 1, 1, 1, 0, 5, -6, 4]])
    found = pruned("magnitude", w, "24")
    assert found.tensors["mask"].tolist() == [[0b10010101], [0b01101100]]
    assert found.tensors["values"].tolist() == [[3, 2, -8, 7], [1, 1, 5, -6]]
    assert found.dequantize().tolist() == [[3, 0, 2, 0, -8, 0, 0, 7], [0, 0, 1, 1, 0, 5, -6, 0]]
    assert found.nbytes == found.scheme.nbytes(2, 8, 4) == 2 + 2 * 4 * 4


def test_integers_of_what_is_left_by_hand():
    """Half of a row: -1, 2 and 1.6, 0.9 stay. [-1, 2]: s = 1, z = 1, codes 0, 3, 3, 2. Zeros have the code 1."""
    w = torch.tensor([[-1.0, 0.4, 2.0, 1.6, 0.9, 0.1, -0.3, 0.2]])
    found = pruned("magnitude", w, "50-int2-channel")
    assert found.codes().tolist() == [[0, 1, 3, 3, 2, 1, 1, 1]]
    assert found.dequantize().tolist() == [[-1, 0, 2, 2, 1, 0, 0, 0]]
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        "mask": [[0b00011101]],
        "codes": [[0b10111100]],
        "scales": [[1.0]],
        "zeros": [[1]],
    }
    assert found.nbytes == 1 + 1 + 2 + 1


def test_wanda_by_hand():
    """|w| ||x||: 1·2, 0.5·1, 0.4·10, 3·0.5; and 0.2·2, 0.9·1, 0.1·10, 1·0.5."""
    w = torch.tensor([[1.0, -0.5, 0.4, 3.0], [0.2, 0.9, 0.1, -1.0]])
    found = pruned("wanda", w, "24", {"input_mean_square": torch.tensor([4.0, 1.0, 100.0, 0.25])})
    assert torch.equal(found.dequantize(), torch.tensor([[1.0, 0, 0.4, 0], [0, 0.9, 0.1, 0]]))


def official_mask(w, x, pattern):
    """Which weights Wanda prunes, by its published rule: norms of activations, then a sort, row by row in Python."""
    metric = w.double().abs() * x.double().norm(dim=0)
    gone = torch.zeros(w.shape, dtype=torch.bool)
    for row, scores in enumerate(metric.tolist()):
        runs = [range(i, i + 4) for i in range(0, len(scores), 4)] if pattern == "24" else [range(len(scores))]
        for run in runs:
            count = 2 if pattern == "24" else int(len(scores) * int(pattern) / 100 + 1e-9)
            for column in sorted(run, key=lambda column: scores[column])[:count]:
                gone[row, column] = True
    return gone


@pytest.mark.parametrize("pattern", ["24", "50", "10", "35", "70"])
def test_wanda_prunes_what_its_published_rule_prunes(pattern):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 96, generator=generator) * moments()["input_mean_square"].sqrt()
    w = weight()
    found = pruned("wanda", w, pattern, {"input_mean_square": x.double().square().mean(0).float()})
    gone = official_mask(w, x, pattern)
    assert torch.equal(found.mask(), ~gone)
    assert torch.equal(found.dequantize(), torch.where(gone, 0, w))


def test_two_of_four_is_the_best_mask_of_six():
    """Of the six ways to keep two of four, the one that keeps the most magnitude."""
    w = weight((10, 32))
    ways = torch.tensor([[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)])
    kept = (w.view(-1, 1, 4).abs() * ways).sum(-1)  # (fours, ways)
    assert torch.equal(pruned("magnitude", w, "24").mask().view(-1, 4), ways[kept.argmax(1)])


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_four_round_trips_through_compressed_tensors(method):
    """Its bitmask is ours bit for bit, and its semi-structured layout holds our weight without loss."""
    for text in ("24", "24-int4-g32", "24-int8-channel-sym"):
        found = pruned(method, weight((64, 128)).bfloat16(), text, moments(128))
        mask = found.mask()
        assert torch.equal(pack_bitmasks(mask), found.tensors["mask"])
        assert torch.equal(unpack_bitmasks(found.tensors["mask"], [64, 128]), mask)
        dense = found.dequantize(torch.bfloat16)
        values, meta = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense)
        if text == "24" and bool((dense[mask] != 0).all()):
            assert torch.equal(values, found.tensors["values"])


def test_bitmasks_of_odd_rows_are_those_of_compressed_tensors():
    found = pruned("magnitude", weight((7, 45)), "50")
    assert torch.equal(pack_bitmasks(found.mask()), found.tensors["mask"])


@pytest.mark.parametrize("text", [text for text in TEXTS if "int" in text])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_integers_are_those_of_rtn_on_the_pruned_weight_and_zeros_stay(method, text):
    w = weight() + 0.02  # far from centred, so that asymmetric grids have their zero near an end
    found = pruned(method, w, text, moments())
    rtn = RTN.quantize(torch.where(found.mask(), w, 0), parse_scheme("rtn" + text[2:]))
    assert torch.equal(found.codes(), rtn.codes())
    assert torch.equal(found.dequantize(), rtn.dequantize())
    assert (found.dequantize()[~found.mask()] == 0).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_ships_is_known_from_the_shape_and_comes_back(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12)) * 32
    text = data.draw(st.sampled_from(TEXTS))
    numbers = torch.tensor([0.0, 1.0, -1.0, 1e-40, 1e-20, 3e4, -3e38, 0.5])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    w, squares = (numbers[torch.randint(8, size, generator=generator)] for size in ((rows, columns), (columns,)))
    method = data.draw(st.sampled_from(["magnitude", "wanda"]))
    statistics = {"input_mean_square": squares.abs()}
    found = pruned(method, w, text, statistics)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.tensors.items()}
    assert shapes == expected_tensors(found.scheme, (rows, columns), torch.float32)
    assert found.nbytes == found.scheme.nbytes(rows, columns, 4)
    again = restore(found.scheme, (rows, columns), found.tensors)
    assert torch.equal(again.dequantize(), found.dequantize())
    assert found.dequantize().isfinite().all()


def test_inputs_that_were_silent_go_first_and_among_them_magnitude_decides():
    w = torch.tensor([[0.1, 9.0, 0.2, 8.0, 7.0, 0.3, 0.1, 0.1]])
    silent = {"input_mean_square": torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 1])}
    assert pruned("wanda", w, "50", silent).mask().tolist() == [[False, False, True, False, False, True, True, True]]
    w[0, 7] = 0.2
    assert pruned("wanda", w, "25", silent).mask().sum() == 6
    assert pruned("wanda", w, "25", silent).mask()[0, [1, 3, 4]].tolist() == [True, False, False]
    none = {"input_mean_square": torch.zeros(8)}
    assert torch.equal(pruned("wanda", w, "50", none).mask(), pruned("magnitude", w, "50").mask())


def test_wanda_loses_less_output_than_magnitude_where_inputs_differ():
    """The claim of the paper, on inputs of which a few are far larger than the rest."""
    x = torch.randn(256, 96, generator=torch.Generator().manual_seed(3)) * moments()["input_mean_square"].sqrt()
    w = weight()
    loss = {
        method: (x @ (pruned(method, w, "50", {"input_mean_square": x.square().mean(0)}).dequantize() - w).T).norm()
        for method in ("magnitude", "wanda")
    }
    assert loss["wanda"] < 0.7 * loss["magnitude"]


@pytest.mark.parametrize(
    ("shape", "text", "rule"),
    [
        ((4, 6), "magnitude24", "2:4 needs inputs in fours, not 6 as of shape (4, 6)"),
        ((4, 7), "magnitude10", "10 % of the 7 inputs of shape (4, 7) is less than one"),
        ((4, 8), "magnitude24-int4-g3", "group size 3 does not divide the 8 inputs of shape (4, 8)"),
        ((4, 8), "rtn-int4-channel", "it is a scheme of method rtn, not of magnitude"),
    ],
)
def test_refusals_name_the_rule_and_the_shape(shape, text, rule):
    assert MAGNITUDE.refuses(Layer("x", "linear", *shape, dtype_bytes=2), parse_scheme(text)) == rule


def test_wanda_needs_inputs_that_were_seen():
    assert "looked up" in WANDA.refuses(Layer("x", "embedding", 8, 8, 2), parse_scheme("wanda24"))
    assert MAGNITUDE.refuses(Layer("x", "embedding", 8, 8, 2), parse_scheme("magnitude24")) is None
    with pytest.raises(SchemeRefused, match="there are none"):
        WANDA.quantize(weight(), parse_scheme("wanda24"))
    assert WANDA.uses_statistics(parse_scheme("wanda24"))
    assert not MAGNITUDE.uses_statistics(parse_scheme("magnitude24"))


def test_a_mask_of_another_pattern_is_refused():
    found = pruned("magnitude", weight((4, 16)), "24")
    lopsided = {**found.tensors, "mask": torch.tensor([[0b00001111, 0b00110011]] * 4, dtype=torch.uint8)}
    with pytest.raises(SchemeRefused, match="mask"):
        restore(found.scheme, (4, 16), lopsided)
    half = pruned("magnitude", weight((4, 16)), "50")
    assert restore(half.scheme, (4, 16), {**half.tensors, "mask": lopsided["mask"]}).nbytes == half.nbytes
    with pytest.raises(SchemeRefused, match="mask"):
        restore(half.scheme, (4, 16), {**half.tensors, "mask": torch.full((4, 2), 255, dtype=torch.uint8)})


def test_the_grid_spans_schemes_of_every_sparsity():
    grid = Grid(
        ("rtn", "wanda"),
        (4, 8),
        (PerGroup(32), PerChannel()),
        ("none", "real"),
        sparsity=(TwoOfFour(), Unstructured(50)),
    )
    found = [str(scheme) for scheme in WANDA.schemes("wanda", grid)]
    assert len(found) == len(set(found)) == 2 * 2 * 2
    assert "wanda24-int4-g32-sym" in found
    assert "wanda24" not in found
    with_keep = Grid(("keep",), (4,), (PerChannel(),), ("none",), sparsity=(Unstructured(30),))
    assert next(iter(WANDA.schemes("wanda", with_keep))) == Sparse("wanda", Unstructured(30))
    assert list(WANDA.schemes("wanda", Grid(("wanda",), (4,), (PerChannel(),), ("none",)))) == []
