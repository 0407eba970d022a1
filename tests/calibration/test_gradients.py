"""The factors of a layer's curvature: exact where that is cheap, unbiased and near where they are projected."""

import pytest
import torch

from autoq.calibration._gradients import SKETCH, Signs, add_rows, factors, squares
from autoq.calibration.curvature import _draw


def gradient(positions, outputs, inputs, dtype=torch.float64):
    """g and x that share a direction, as those of a sequence do, with outputs of very different size."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(positions, outputs, generator=generator) * torch.logspace(0, 1, outputs)
    x = torch.randn(positions, inputs, generator=generator) + 2 * torch.randn(inputs, generator=generator)
    return g.to(dtype), x.to(dtype)


@pytest.mark.parametrize(("positions", "outputs", "inputs"), [(200, SKETCH, 90), (200, 90, SKETCH), (SKETCH, 90, 90)])
def test_few_outputs_inputs_or_positions_are_exact(positions, outputs, inputs):
    g, x = gradient(positions, outputs, inputs, torch.float32)
    diagonal, rows, mixed = factors(g, x, Signs(), None)
    whole = g.double().t() @ x.double()
    assert mixed is None
    assert len(rows) <= max(SKETCH, outputs)
    assert torch.allclose(diagonal.double(), whole.square().sum(1), rtol=1e-4)
    exact = whole.t() @ whole
    assert torch.allclose((rows.t() @ rows).double(), exact, rtol=1e-4, atol=1e-4 * float(exact.diagonal().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_several_passes_come_near_the_exact_factors(dtype):
    """Four passes of independent signs: each output's share to 2 / √(k passes), the layer's whole loss to 2 %."""
    g, x = gradient(160, 300, 200, dtype)
    signs, passes, kept, total, square = Signs(), 4, [], 0.0, None
    for _ in range(passes):
        signs.draw()
        diagonal, rows, mixed = factors(g, x, signs, None)
        again = factors(g, x, signs, mixed)
        assert torch.equal(again[0], diagonal)
        total = total + diagonal.double() / passes
        square = add_rows(kept, square, rows)
    assert square is not None
    square = square + sum(rows.t() @ rows for rows in kept)
    whole = g.double().t() @ x.double()
    exact = whole.square().sum(1)
    relative = ((total - exact) / exact).square().mean().sqrt()
    assert 0.02 < float(relative) < 2 / (SKETCH * passes) ** 0.5
    delta = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)).double()
    found, true = square.double() / passes, whole.t() @ whole
    assert float(found.trace() / true.trace()) == pytest.approx(1, abs=0.15)
    costs = [a @ ((delta @ h) * delta).sum(1) / h.trace() for a, h in ((total, found), (exact, true))]
    assert float(costs[0] / costs[1]) == pytest.approx(1, abs=0.1)


def test_signs_are_the_same_for_a_size_within_a_pass_and_for_every_run():
    one, other, like = Signs(), Signs(), torch.zeros(1)
    first = one(5, like)
    assert first is one(5, like)
    assert torch.equal(first, other(5, like))
    assert set(first.flatten().tolist()) == {-1.0, 1.0}
    one.draw()
    assert not torch.equal(first, one(5, like))


def test_rows_become_their_squares_once_they_are_as_many_as_numbers_in_one():
    kept, square = [], None
    rows = torch.arange(12.0).view(4, 3)
    square = add_rows(kept, square, rows[:2])
    assert square is None
    assert len(kept) == 1
    square = add_rows(kept, square, rows[2:])
    assert kept == []
    assert torch.equal(square, rows.t() @ rows)


def test_squares_by_position_and_by_output():
    g = torch.randn(700, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    by_position, by_output = squares(g)
    assert torch.allclose(by_position.double(), g.double().square().sum(1), rtol=1e-5)
    assert torch.allclose(by_output.double(), g.double().square().sum(0), rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7, 100, 1003])
def test_a_label_is_that_in_whose_share_the_uniform_number_falls(classes):
    generator = torch.Generator().manual_seed(classes)
    p = (3 * torch.randn(1, classes, generator=generator)).softmax(-1)
    uniform = torch.rand(400, 1, generator=generator)
    labels, others = _draw(p.expand(400, -1), uniform)
    upto = p.double().cumsum(-1)
    expected = torch.searchsorted(upto.expand(400, -1).contiguous(), uniform.double(), right=True)
    near = ((upto[0] - uniform.double()).abs() < 1e-6).any(1, keepdim=True)  # where rounding may decide
    assert torch.equal(labels[~near], expected[~near])
    assert torch.allclose(others.double(), 1 - p[0].double()[labels], atol=1e-6)


def test_a_label_that_has_no_probability_is_never_drawn():
    p = torch.zeros(3, 10)
    p[:, 4] = 1.0
    assert _draw(p, torch.tensor([[0.0], [0.5], [1.0 - 2**-24]]))[0].flatten().tolist() == [4, 4, 4]
