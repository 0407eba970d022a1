"""Where layers of every family stand: blocks down, modules across."""

from __future__ import annotations

from autoq.dashboards.grid import OUTSIDE, Grid
from autoq.layer import Layer


def layer(name, block=None, stack=None, kind="linear"):
    return Layer(name, kind, 64, 64, 2, block=block, stack=stack)


def where(names, layers=()):
    grid = Grid.of(names, {each.name: each for each in layers})
    return grid.rows, grid.columns, {name: (spot.row, spot.column) for spot in grid.spots for name in spot.names}


def test_experts_of_a_block_are_one_cell():
    layers = [layer("model.embed_tokens", kind="embedding")]
    for block in range(2):
        prefix = f"model.layers.{block}.mlp"
        layers += [layer(f"{prefix}.gate", block, kind="router")]
        layers += [layer(f"{prefix}.experts.{e}.down_proj", block, f"{prefix}.experts.down_proj") for e in range(8)]
    layers += [layer("lm_head", kind="head")]
    grid = Grid.of([each.name for each in layers], {each.name: each for each in layers})
    assert grid.rows == ("model.embed_tokens", "0", "1", "lm_head")
    assert grid.columns == ("mlp.gate", "mlp.experts.*.down_proj", OUTSIDE)
    (experts, *_) = [spot for spot in grid.spots if spot.row == "1" and spot.column.startswith("mlp.experts")]
    assert experts.label == "8 × model.layers.1.mlp.experts.*.down_proj"
    assert len(experts.names) == 8


def test_encoder_and_decoder_have_rows_of_their_own():
    stacks, blocks = ("encoder", "decoder"), (0, 10, 2)
    names = [f"{s}.block.{b}.layer.{i}.{m}" for s in stacks for b in blocks for i, m in enumerate("qv")]
    rows, columns, _ = where([*names, "shared", "lm_head"])
    assert rows == ("shared", *(f"{s} {b}" for s in ("decoder", "encoder") for b in (0, 2, 10)), "lm_head")
    assert columns == ("layer.*.q", "layer.*.v", OUTSIDE)


def test_layers_that_a_number_alone_tells_apart_keep_it():
    rows, columns, places = where(["h.0.mlp.0.fc", "h.0.mlp.1.fc", "h.1.mlp.0.fc"])
    assert rows == ("0", "1")
    assert places["h.0.mlp.0.fc"] == ("0", "mlp.0.fc")
    assert places["h.0.mlp.1.fc"] == ("0", "mlp.1.fc")
    assert len(places) == 3
    assert columns == ("mlp.0.fc", "mlp.1.fc")


def test_what_has_no_block_has_a_row():
    rows, columns, places = where(["visual.proj", "a"], [layer("visual.proj"), layer("a")])
    assert rows == ("visual.proj", "a")
    assert columns == (OUTSIDE,)
    assert where([]) == ((), (), {})
    # A number that the model says is no block is none.
    assert where(["stem.3.conv"], [layer("stem.3.conv")])[0] == ("stem.3.conv",)
    assert where(["stem.3.conv"])[0] == ("3",)
    assert places["a"] == ("a", OUTSIDE)


def test_blocks_are_in_the_order_of_numbers():
    assert where([f"h.{block}.fc" for block in (10, 9, 1, 0)])[0] == ("0", "1", "9", "10")
