"""Which elements a dropout mask removes, drawn at the cost of the removed elements alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lora.transforms import is_transformed

# Above this share of dropped elements, or off the CPU, drawing every element is the cheaper way.
SPARSE_LIMIT = 0.25
# So is it for inputs of fewer elements than this.
SPARSE_FROM = 2**12


def draw_dropped(x: Tensor, p: float) -> Tensor:
    """Draw the elements of ``x`` that dropout with probability ``p`` removes, each independently.

    Returns:
        Either the flat positions of the dropped elements (int64, shape ``(n,)``), or, where a dense
        draw is cheaper or the shapes must be static, a bool mask of the shape of ``x`` that is true
        where the element is dropped. `zero_dropped` takes both.
    """
    dense = x.numel() < SPARSE_FROM or p > SPARSE_LIMIT or x.device.type != "cpu"
    if dense or torch.compiler.is_compiling() or is_transformed():
        # Not in the default dtype: "bf16-true" training sets that to one with coarse steps.
        return torch.rand(x.shape, device=x.device, dtype=torch.float32) < p
    return dropped_positions(x.numel(), p)


def dropped_positions(numel: int, p: float) -> Tensor:
    """Positions of the successes of ``numel`` independent trials with probability ``p``, on the
    CPU.

    The gaps between successes of a Bernoulli process are geometric (Devroye, Non-Uniform Random
    Variate Generation, 1986, section X.2): ``floor(log(1 - u) / log(1 - p))`` failures precede each
    success.

    Args:
        numel: Number of trials.
        p: Probability of a success, in ``(0, 1)``.

    Returns:
        Sorted int64 positions, shape ``(number of successes,)``.
    """
    draws = draws_of(numel, p)
    positions = _successes(draws, p)
    while int(positions[-1]) < numel:
        positions = torch.cat([positions, _successes(draws, p) + (positions[-1] + 1)])
    return positions[: int(torch.searchsorted(positions, numel))]


def draws_of(numel: int, p: float) -> int:
    """How many successes are drawn at a time, nearly always enough for so many trials."""
    expected = numel * p
    return int(expected + 6 * math.sqrt(expected) + 8)


def _successes(draws: int, p: float) -> Tensor:
    # float64: the largest gap must not be cut short by the granularity of u near 1.
    u = torch.rand(draws, dtype=torch.float64, device="cpu")
    gaps = torch.log1p(-u).div_(math.log1p(-p)).floor_()
    return gaps.to(torch.int64).add_(1).cumsum(0).sub_(1)


def zero_dropped(x: Tensor, dropped: Tensor) -> Tensor:
    """``x`` with the dropped elements set to zero, out of place and differentiable in ``x``."""
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped, 0.0)
    return x.reshape(-1).index_fill(0, dropped, 0.0).reshape(x.shape)


def zero_dropped_(x: Tensor, dropped: Tensor) -> Tensor:
    """As `zero_dropped`, in place; ``x`` must be contiguous."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped.view(x.shape), 0.0)
    x.view(-1).index_fill_(0, dropped, 0.0)
    return x
