"""The mathematics of LoRA as pure functions on tensors.

`lora_linear` computes ``y = x W^T + b + s * D(x) A^T B^T`` (arXiv:2106.09685, equation 3; D is
dropout), and `lora_linears` several such layers of one input. While only the factors (and perhaps
b) train, they run as one autograd node that keeps ``x`` and the skinny ``A D(x)^T`` and nothing of
the size of the output (`lightning_lora.projections`). Inputs so small that calling the node takes
longer than computing it go through ordinary operations instead, which autograd runs without Python;
so does everything inside transforms of `torch.func` and the like, and inputs that are nested or
sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.projections import JoinedProjections, factors_in, project
from lightning_lora.transforms import is_transformed

# Elements of an input below which ordinary operations are faster, measured on CPUs.
SMALL_INPUT = 2**15


class LoRAProjection(NamedTuple):
    """A linear layer with a low-rank update.

    Attributes:
        weight: Base weight W, shape ``(out, in)``.
        bias: Base bias b, shape ``(out,)``, or ``None``.
        A: Factor of shape ``(r, in)``; cast to the dtype of the computation.
        B: Factor of shape ``(out, r)``; cast likewise.
        scaling: The factor s in front of the update.
        dropout: Probability of dropping an element of the adapter's input; 0 in evaluation.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with a low-rank update: ``x W^T + b + s * D(x) A^T B^T``.

    Args:
        x: Input, shape ``(..., in)``, floating point.
        weight: Base weight W, shape ``(out, in)``.
        bias: Base bias b, shape ``(out,)``, or ``None``.
        A: Factor of shape ``(r, in)``; cast to the dtype of the computation.
        B: Factor of shape ``(out, r)``; cast likewise.
        scaling: The factor s in front of the update.
        dropout: Probability of dropping an element of the adapter's input; 0 in evaluation.

    Returns:
        Tensor of shape ``(..., out)``, in the dtype that `torch.nn.functional.linear` would return,
        also under autocast.

    Example:
        >>> x, W = torch.ones(2, 3), torch.zeros(4, 3)
        >>> A, B = torch.ones(1, 3), torch.ones(4, 1)
        >>> lora_linear(x, W, None, A, B, scaling=0.5)
        tensor([[1.5000, 1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000, 1.5000]])
    """
    return lora_linears(x, [LoRAProjection(weight, bias, A, B, scaling, dropout)])[0]


def lora_linears(x: Tensor, projections: Sequence[LoRAProjection]) -> tuple[Tensor, ...]:
    """Several linear layers with low-rank updates, of one input.

    The same values as `lora_linear` for each, up to rounding, with the work on the input's side
    shared: one product with all the A, one gradient of x.

    Args:
        x: Input, shape ``(..., in)``, floating point.
        projections: The layers; each draws a dropout mask of its own.

    Returns:
        The outputs, each of shape ``(..., out)`` with its layer's number of outputs.
    """
    dtype = compute_dtype(x)
    dropped = [draw_dropped(x, each.dropout) if each.dropout else None for each in projections]
    apart = torch.is_grad_enabled() and any(each.weight.requires_grad for each in projections)
    if apart or prefers_operations(x, projections[0].weight):
        pairs = zip(projections, dropped, strict=True)
        return tuple(_formula(x, each, mask, dtype) for each, mask in pairs)
    # Here and not in the node: its gradient is that of a cast.
    x = x.to(dtype)
    weights, biases, As, Bs, scalings, _ = zip(*projections, strict=True)
    scalings = tuple(each.scaling / (1 - each.dropout) for each in projections)
    if not torch.is_grad_enabled():
        factors = factors_in(dtype, As, Bs)
        return project(x, weights, biases, *factors, scalings, dropped)[0]
    outs: tuple[Tensor, ...] = JoinedProjections.apply(
        x, scalings, *weights, *biases, *As, *Bs, *dropped
    )
    return outs


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The update ``s * B @ A``, shape ``(out, in)``, in the dtype of the factors."""
    return torch.mm(B * scaling, A)


def prefers_operations(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is run in ordinary operations although its weight is frozen.

    Args:
        x: Its input.
        weight: Its weight.
    """
    if torch.compiler.is_compiling():
        return False
    if x.layout != torch.strided or x.is_nested:
        return True
    # Of a weight in another dtype autocast would keep a cast copy for backward.
    is_small = x.numel() < SMALL_INPUT and weight.dtype == compute_dtype(x)
    return is_small or is_transformed()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in for an input: that of autocast, if it is on."""
    device = x.device.type
    # Autocast leaves double precision alone.
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _formula(
    x: Tensor, projection: LoRAProjection, dropped: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """One layer in ordinary operations."""
    weight, bias, A, B, scaling, dropout = projection
    out = F.linear(x, weight, bias)
    adapter_in = x if dropped is None else zero_dropped(x, dropped)
    hidden = F.linear(adapter_in.to(dtype), A.to(dtype))
    return torch.add(out, F.linear(hidden, B.to(dtype)), alpha=scaling / (1 - dropout))
