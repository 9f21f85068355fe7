"""The cross-entropy of each token, without a copy of all logits in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
# Logits that are computed with at a time: 16 MiB in float32.
CHUNK = 2**22


def token_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each token.

    Half-precision logits are computed with in float32 a few rows at a time, in both directions, so
    that beside the logits and their gradient, in their own dtype, nothing of their size is kept.

    Args:
        logits: Floating point, `[tokens, vocabulary]`.
        targets: int64 `[tokens]`; `IGNORED` (-100) where nothing is to be predicted.
        smoothing: Share of each target that is spread over the vocabulary.

    Returns:
        float32 (float64 for such logits) `[tokens]`; 0 where nothing is to be predicted.

    Example:
        >>> token_cross_entropy(torch.zeros(2, 4), torch.tensor([3, IGNORED]))
        tensor([1.3863, 0.0000])
    """
    losses: Tensor = _TokenCrossEntropy.apply(logits, targets, smoothing)
    return losses


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.zeros(len(targets), dtype=wide, device=logits.device)
        normalizers = torch.zeros_like(losses)
        for rows in _chunks(targets, logits.shape[1]):
            scores = logits[rows].to(wide)
            normalizers[rows] = scores.logsumexp(1)
            target = scores.gather(1, targets[rows, None]).squeeze(1)
            losses[rows] = normalizers[rows] - (1 - smoothing) * target
            if smoothing:
                losses[rows] -= smoothing * scores.mean(1)
        ctx.save_for_backward(logits, targets, normalizers)
        ctx.smoothing = smoothing
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normalizers = ctx.saved_tensors
        smoothing = ctx.smoothing
        result = torch.zeros_like(logits)
        for rows in _chunks(targets, logits.shape[1]):
            shares = logits[rows].to(grad.dtype).sub_(normalizers[rows, None]).exp_()
            if smoothing:
                shares -= smoothing / logits.shape[1]
            hit = torch.full_like(shares[:, :1], smoothing - 1)
            shares.scatter_add_(1, targets[rows, None], hit)
            result[rows] = shares.mul_(grad[rows, None]).to(logits.dtype)
        return result, None, None


def _chunks(targets: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Yield the places of the tokens that are predicted, some at a time."""
    places = (targets != IGNORED).nonzero().squeeze(1)
    return iter(places.split(max(1, CHUNK // vocabulary)))
