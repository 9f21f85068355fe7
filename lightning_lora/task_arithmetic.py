"""Tensors of several adapters made into one: weighted sums of what pruning leaves of each.

- Pruning by magnitude keeps the largest elements of each tensor.
- TIES (arXiv:2306.01708) prunes so, elects a sign for each element, and takes the mean of what has
  that sign.
- DARE (arXiv:2311.03099) drops elements at random and rescales the others; then sums, or goes on
  like TIES.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ARITHMETIC = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS = ("total", "frequency")


def combine(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], density: float, sign: str
) -> Tensor:
    """The combination of tensors of one shape, as in PEFT.

    Args:
        kind: One of `ARITHMETIC`.
        tensors: The tensors.
        weights: A weight for each.
        density: The part of the elements that pruning keeps, from 0 to 1.
        sign: How TIES elects signs: by the sum of the values (``"total"``) or by their number
            (``"frequency"``).

    Returns:
        A tensor of that shape.

    Example:
        >>> pair = torch.tensor([4.0, -1.0, 0.5]), torch.tensor([2.0, 3.0, -0.1])
        >>> combine("linear", pair, [1.0, 0.5], 1.0, "total")
        tensor([5.0000, 0.5000, 0.4500])
        >>> combine("ties", pair, [1.0, 0.5], 0.7, "total")
        tensor([2.5000, 1.5000, 0.0000])
    """
    if kind in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        tensors = [_some(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    own = stacked.new_tensor(list(weights)).reshape(-1, *[1] * (stacked.ndim - 1))
    if kind not in ("ties", "dare_ties"):
        return (stacked * own).sum(0)
    elected = (stacked if sign == "total" else stacked.sign()).sum(0) >= 0
    agrees = stacked.sign() == torch.where(elected, 1, -1)
    return (stacked * own * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten().index_fill_(0, kept, 1)
    return tensor * mask.reshape(tensor.shape)


def _some(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
