from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.dropout import draw_dropped, dropped_positions, zero_dropped, zero_dropped_


def as_mask(dropped: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return zero_dropped(torch.ones(shape), dropped) == 0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_every_element_is_dropped_with_probability_p(p: float) -> None:
    torch.manual_seed(0)
    x = torch.zeros(1000, 400)
    mask = as_mask(draw_dropped(x, p), x.shape)
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.double().mean() - p) < 5 * sigma / math.sqrt(x.numel())
    # No row or column is favoured, and neighbours are independent.
    assert (mask.double().mean(0) - p).abs().max() < 5 * sigma / math.sqrt(1000)
    assert (mask.double().mean(1) - p).abs().max() < 5 * sigma / math.sqrt(400)
    flat = mask.reshape(-1).double() - p
    correlation = (flat[1:] * flat[:-1]).mean() / sigma**2
    assert abs(correlation) < 5 / math.sqrt(x.numel())


@pytest.mark.parametrize("p", [1e-9, 0.2])
def test_positions_are_sorted_distinct_and_inside(p: float) -> None:
    torch.manual_seed(0)
    for numel in (1, 2, 50, 10_000):
        for _ in range(20):
            positions = dropped_positions(numel, p)
            assert positions.dtype == torch.int64
            assert bool((positions.diff() > 0).all())
            assert positions.numel() == 0 or 0 <= int(positions[0]) <= int(positions[-1]) < numel


def test_the_draw_goes_on_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = iter([[0, 4], [1, 3], [2, 9]])
    monkeypatch.setattr("lightning_lora.dropout._successes", lambda *_: torch.tensor(next(gaps)))
    assert dropped_positions(14, 0.2).tolist() == [0, 4, 6, 8, 11]


def test_few_elements_are_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    few, many = draw_dropped(torch.zeros(8, 64), 0.1), draw_dropped(torch.zeros(64, 64), 0.1)
    assert few.dtype == torch.bool and few.shape == (8, 64)
    assert many.dtype == torch.int64 and many.ndim == 1
    assert abs(few.double().mean() - 0.1) < 5 * 0.3 / math.sqrt(few.numel())


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_the_global_generator_decides(p: float) -> None:
    x = torch.zeros(50, 40)
    torch.manual_seed(3)
    first, second = draw_dropped(x, p), draw_dropped(x, p)
    torch.manual_seed(3)
    assert torch.equal(draw_dropped(x, p), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_the_default_dtype_does_not_count(p: float) -> None:
    x = torch.zeros(100, 100)
    torch.manual_seed(0)
    expected = draw_dropped(x, p)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(draw_dropped(x, p), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (2, 3, 4)])
def test_zeroing_in_and_out_of_place(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape) + 1
    dropped = draw_dropped(x, p)
    out = zero_dropped(x, dropped)
    assert out.shape == x.shape
    assert bool(((out == 0) | (out == x)).all())
    copy = x.clone()
    assert zero_dropped_(copy, dropped) is copy
    assert torch.equal(copy, out)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_zeroing_is_differentiable(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    dropped = draw_dropped(x, p)
    assert torch.autograd.gradcheck(lambda x: zero_dropped(x, dropped), (x,))
