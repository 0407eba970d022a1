"""The curvature proxy against what it approximates."""

import os

import pytest
import torch

from autoq.calibration.curvature import bound, is_whole, proxy, save
from autoq.errors import AutoQError


def test_linear_layer_by_hand():
    """½ Σ_i g_i² (ΔW H ΔWᵀ)_ii on a 2×2 layer."""
    statistics = {
        "grad_square": torch.tensor([1.0, 4.0]),
        "input_square": torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
        "step_square": torch.tensor([1.2]),
    }
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    dequantized = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    # rows of ΔW: (1, 0) -> 2; (1, -1) -> 2 - 2 + 3 = 3
    assert proxy(statistics, weight, dequantized, False) == pytest.approx(0.5 * (1 * 2 + 4 * 3))
    # noise of the input: rows of W squared are 1 and 4, times 1.2 / 12
    assert proxy(statistics, weight, dequantized, True) == pytest.approx(7.0 + 0.5 * 0.1 * (1 * 1 + 4 * 4))


def test_inputs_and_their_second_moment_say_the_same():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    dequantized = weight + 0.1 * torch.randn(3, 5)
    grad_square = torch.rand(3)
    a = proxy({"grad_square": grad_square, "inputs": x}, weight, dequantized, False)
    b = proxy({"grad_square": grad_square, "input_square": x.t() @ x / 7}, weight, dequantized, False)
    assert a == pytest.approx(b, rel=1e-5)


def test_embedding_rows_count_as_often_as_they_are_read():
    statistics = {"row_frequency": torch.tensor([0.5, 0.0]), "row_grad_square": torch.tensor([1.0, 2.0])}
    weight = torch.zeros(2, 2)
    assert proxy(statistics, weight, torch.tensor([[1.0, 1.0], [9.0, 9.0]]), False) == pytest.approx(0.5 * 0.5 * 3)


def test_a_layer_that_is_never_used_costs_nothing():
    assert proxy({}, torch.ones(2, 2), torch.zeros(2, 2), False) == 0


def test_statistics_that_lost_bytes_are_not_whole(tmp_path):
    file = tmp_path / "statistics" / "one.safetensors"
    assert not is_whole(file)
    save({"layer": {"grad_square": torch.ones(64)}}, file)
    assert is_whole(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_whole(file)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "statistics").touch()
    with pytest.raises(AutoQError, match=r"^the statistics cannot be written to .*AUTOQ_CACHE"):
        save({"layer": {"grad_square": torch.ones(2)}}, tmp_path / "statistics" / "one.safetensors")


def test_old_statistics_make_room_and_the_newest_stays(tmp_path):
    for age, name in enumerate(("new", "used", "old")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "other.txt").write_text("not ours")
    bound(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "other.txt", "used.safetensors"]
    bound(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.safetensors", "other.txt"]
