"""Factors that do not start from zero, and what they started from.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start the factors from the principal part of
the weight and take that part out of the base: ``W x + s (B A - B0 A0) x``. Here the base is left as
it is, whole and in its own precision, and what the factors started from goes with them: the update
is one of rank 2r, ``[B, -B0] [A; A0]``, in every forward pass, every merge and every export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

START = {"A": "A_init", "B": "B_init"}
# The factors of LoftQ's round before, which settle how the base was quantized.
PRIOR = {"A": "A_prior", "B": "B_prior"}


def keeps_start(init: str) -> bool:
    """Whether an initialisation has no zero factor, so that its start is subtracted.

    >>> keeps_start("pissa_niter_4"), keeps_start("orthogonal")
    (True, False)
    """
    return init == "olora" or init.startswith("pissa")


def with_start(
    A: Tensor, B: Tensor, A_init: Tensor, B_init: Tensor, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Factors of rank 2r whose product is ``B A - B_init A_init``.

    Args:
        A: Shape ``(parts * r, in)``.
        B: Shape ``(out, r)``; rows of several parts stand one below the other.
        A_init: As A was at the start.
        B_init: As B was at the start.
        parts: The number of parts of a fused projection with factors of their own.

    Returns:
        Shapes ``(parts * 2r, in)`` and ``(out, 2r)``; differentiable in A and B.

    Example:
        >>> A, B = torch.ones(1, 3), torch.full((2, 1), 5.0)
        >>> up, down = with_start(A, B, A, torch.ones(2, 1))
        >>> down @ up
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """
    shape = (parts, -1, A.shape[1])
    joined = torch.cat([A.reshape(shape), A_init.reshape(shape)], dim=1)
    return joined.reshape(-1, A.shape[1]), torch.cat([B, -B_init], dim=1)


def starts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What factors started from, of an adapter's state."""
    return {n: t for n, t in state.items() if n.rpartition(".")[2] in START.values()}


def without_starts(
    state: Mapping[str, Tensor], parts: Mapping[str, int]
) -> tuple[dict[str, Tensor], set[str]]:
    """An adapter's state with plain factors alone, right on the base as it is.

    Args:
        state: Tensors by name.
        parts: The number of parts with factors of their own, of layers that have several.

    Returns:
        The state, and the names of the layers whose factors have rank 2r in it.
    """
    result: dict[str, Any] = dict(state)
    ending = f".lora.{START['A']}"
    layers = {name.removesuffix(ending) for name in state if name.endswith(ending)}
    for layer in layers:
        start = [result.pop(f"{layer}.lora.{leaf}") for leaf in START.values()]
        own = [result[f"{layer}.lora.{leaf}"] for leaf in START]
        joined = with_start(own[0], own[1], start[0], start[1], parts.get(layer, 1))
        for leaf, value in zip(START, joined, strict=True):
            result[f"{layer}.lora.{leaf}"] = value
    return result, layers
