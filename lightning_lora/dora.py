"""The mathematics of DoRA (weight-decomposed low-rank adaptation, arXiv:2402.09353) as pure
functions on tensors.

A weight W0 of shape ``(out, in)`` becomes ``W' = m * V / ||V||`` with ``V = W0 + s B A`` (equation
5), where ``||V||`` holds the norm of each row (each output feature) and the magnitude m, of shape
``(out,)``, trains. As in section 4.3 the norm is a constant to the gradients. PEFT does the same.

The norm is computed in the dtype of the factors (float32 or wider) whatever the dtype of W0, and
without making V, from ``||W0_j||^2 + s <2 W0_j A^T + s B_j (A A^T), B_j>``: one pass over W0 and a
product with r columns, where PEFT makes B A anew in every forward pass. While B is zero the second
term is exactly zero, so that an m that was measured by the same function on the same device gives
``m / ||V|| = 1`` and the output is bitwise the base's; measured elsewhere (before a move to another
device, or a cast of the weight) it is within the rounding of a norm. The sum loses digits only
where s B A cancels nearly all of a row of W0.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.transforms import is_transformed

# How many elements of a weight are cast at a time to be measured.
_BLOCK = 2**22


class Frozen(Protocol):
    """A frozen linear layer that is no plain matrix."""

    def base_forward(self, x: Tensor) -> Tensor:
        """Its output with the bias, in the dtype of its computation."""

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that it computes with, shape ``(out, in)``."""


@torch.no_grad()
def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``||W0 + s B A||`` of each row.

    Args:
        weight: W0, shape ``(..., out, in)``, of any floating dtype.
        A: Shape ``(..., r, in)``.
        B: Shape ``(..., out, r)``.
        scaling: The factor s.

    Returns:
        Shape ``(..., out)`` in the dtype of A, or float32 if that is wider; detached.

    Example:
        >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]])
        >>> weight_norm(W, A, B, scaling=2.0)
        tensor([5.])
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    with torch.autocast(A.device.type, enabled=False):
        A, B = A.to(dtype), B.to(dtype)
        gram = A @ A.mT
        size = max(1, _BLOCK // max(1, weight.shape[-1]))
        if weight.dtype == dtype or weight.ndim > 2:
            size = max(1, weight.shape[-2])
        norms = []
        for rows, own in zip(weight.split(size, dim=-2), B.split(size, dim=-2), strict=True):
            rows = rows.to(dtype)
            cross = 2 * (rows @ A.mT) + scaling * (own @ gram)
            squared = torch.linalg.vector_norm(rows, dim=-1).square()
            squared += scaling * (cross * own).sum(-1)
            norms.append(squared.clamp_min_(0).sqrt_())
        return torch.cat(norms, dim=-1)


def direction_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``m / ||V||``, what V is multiplied by; 1 where a row of V is zero and has no direction.

    Args:
        magnitude: m, shape ``(out,)``.
        norm: The norm of each row of V, shape ``(out,)``.
    """
    known = norm > 0
    return torch.where(known, magnitude / torch.where(known, norm, 1), 1)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with a DoRA weight: ``y = x W0^T + b + (c - 1) D(x) W0^T + c s D(x) A^T B^T``
    with ``c = m / ||W0 + s B A||``, which without dropout is ``x W'^T + b``.

    While the weight is frozen it runs as one autograd node that keeps, of the size of the output,
    one tensor (which the gradient of m needs). With dropout the base's product is computed twice,
    as PEFT does: what m changes sees the dropped input, the base itself the whole.

    Args:
        x: Input, shape ``(..., in)``.
        weight: W0, shape ``(out, in)``.
        bias: b, shape ``(out,)``, or ``None``.
        A: Shape ``(r, in)``.
        B: Shape ``(out, r)``.
        magnitude: m, shape ``(out,)``, in the dtype of A.
        scaling: The factor s.
        dropout: Probability of dropping an element of D's input; 0 in evaluation.

    Returns:
        Shape ``(..., out)``, in the dtype that `torch.nn.functional.linear` would return.

    Example:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1)
        >>> dora_linear(torch.ones(1, 2), W, None, A, B, torch.tensor([1.0, 3.0]), scaling=2.0)
        tensor([[1., 3.]])
    """
    norm = weight_norm(weight, A, B, scaling)
    dropped = draw_dropped(x, dropout) if dropout > 0 else None
    if weight.requires_grad or is_transformed():
        return _composite(x, weight, bias, A, B, magnitude, norm, dropped, scaling, dropout)
    out: Tensor = _DoRALinear.apply(
        x, weight, bias, A, B, magnitude, norm, dropped, scaling, dropout, None
    )
    return out


def dora_frozen(
    x: Tensor,
    layer: Frozen,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`dora_linear` for a layer whose weight is packed; the dtype is that of its own output."""
    norm = weight_norm(layer.base_weight(A.dtype), A, B, scaling)
    dropped = draw_dropped(x, dropout) if dropout > 0 else None
    out: Tensor = _DoRALinear.apply(
        x, None, bias, A, B, magnitude, norm, dropped, scaling, dropout, layer
    )
    return out


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    dropped: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """The formula in ordinary operations, for a weight that trains too."""
    base = F.linear(x, weight, bias)
    kept = _kept(x.to(base.dtype), dropped, dropout)
    update = F.linear(F.linear(kept, A.to(base.dtype)), B.to(base.dtype)) * scaling
    change = direction_scale(magnitude, norm) - 1
    return (base + update + change * (F.linear(kept, weight) + update)).to(base.dtype)


def _kept(x: Tensor, dropped: Tensor | None, dropout: float) -> Tensor:
    """The input after dropout."""
    return x if dropped is None else zero_dropped(x, dropped) * (1 / (1 - dropout))


class _DoRALinear(torch.autograd.Function):
    """`dora_linear` for a frozen weight, with a hand-written backward.

    With ``U = D(X) V^T`` (N x out), the gradient G and ``G' = c G``: ``dm = sum(G U) / ||V||``,
    ``dA = s (B^T G'^T) D(X)``, ``dB = s (A D(X)^T G')^T`` and ``dX = G' V``, or with dropout
    ``G W0 + D((G' - G) W0 + s G' B A)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        dropped: Tensor | None,
        scaling: float,
        dropout: float,
        layer: Frozen | None,
    ) -> Tensor:
        def base_of(inputs: Tensor, bias: Tensor | None) -> Tensor:
            if layer is None:
                assert weight is not None
                return F.linear(inputs, weight, bias)
            return layer.base_forward(inputs)

        # On the input as it came: the base's own result, bit for bit, under autocast too.
        base = base_of(x, bias)
        dtype, rows = base.dtype, math.prod(x.shape[:-1])
        scale = direction_scale(magnitude, norm)
        kept = _kept(x.to(dtype), dropped, dropout)
        hidden_t = torch.mm(A.to(dtype), kept.reshape(rows, x.shape[-1]).t()).to(dtype)
        B_t = B.to(dtype).t()
        flat = base.reshape(rows, base.shape[-1])
        flat.addmm_(hidden_t.t(), B_t, alpha=scaling)
        # Products with the scale are in its precision: in bfloat16 it would mostly round to 1.
        out = torch.empty_like(flat)
        if dropped is None:
            directed = flat
            if bias is None:
                torch.mul(flat, scale, out=out)
            else:
                torch.addcmul(bias * (1 - scale), flat, scale, out=out)
        else:
            directed = base_of(kept, None).reshape(flat.shape)
            if layer is not None and bias is not None:
                directed -= bias
            directed.addmm_(hidden_t.t(), B_t, alpha=scaling)
            torch.addcmul(flat, directed, scale - 1, out=out)
        ctx.save_for_backward(
            x, weight, bias, A, B, norm, scale, hidden_t, dropped, directed.detach(), magnitude
        )
        ctx.scaling, ctx.dropout, ctx.layer = scaling, dropout, layer
        # Autograd refuses in-place changes of a custom function's output when it is a view.
        return torch.ops.aten._unsafe_view(out, base.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_grads(ctx, grad)
        x, weight, bias, A, B, norm, scale, hidden_t, dropped, directed, _ = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = ctx.needs_input_grad[:6]
        dtype, scaling, rows = directed.dtype, ctx.scaling, len(directed)
        g = grad.reshape(directed.shape).to(dtype)
        # Into a tensor of its own where that spares one in the wider dtype of the scale.
        narrow = dtype != scale.dtype
        scaled = torch.mul(g, scale, out=torch.empty_like(g)) if narrow else g * scale
        grad_hidden_t = torch.mm(B.to(dtype).t(), scaled.t())
        totals = None
        if needs_bias or (needs_m and bias is not None):
            totals = g.sum(0, dtype=scale.dtype)
        grad_x = grad_A = grad_B = grad_m = None
        if needs_A:
            kept = _kept(x.to(dtype), dropped, ctx.dropout).reshape(rows, x.shape[-1])
            grad_A = torch.mm(grad_hidden_t, kept).mul(scaling).to(A.dtype)
        if needs_B:
            grad_B = torch.mm(hidden_t, scaled).t().mul(scaling).to(B.dtype)
        if needs_m:
            grad_m = (g * directed).sum(0, dtype=scale.dtype)
            if bias is not None and dropped is None:
                grad_m -= bias * totals
            grad_m = torch.where(norm > 0, grad_m / norm, 0)
        if needs_x:
            W = weight.to(dtype) if ctx.layer is None else ctx.layer.base_weight(dtype)
            first = scaled if dropped is None else scaled - g
            grad_x = torch.mm(first, W)
            grad_x.addmm_(grad_hidden_t.t(), A.to(dtype), alpha=scaling)
            grad_x = _kept(grad_x.reshape(x.shape), dropped, ctx.dropout)
            if dropped is not None:
                grad_x = grad_x + torch.mm(g, W).reshape(x.shape)
            grad_x = grad_x.to(x.dtype)
        grad_bias = totals.to(bias.dtype) if needs_bias and totals is not None else None
        return grad_x, None, grad_bias, grad_A, grad_B, grad_m, None, None, None, None, None


def _differentiable_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For a second derivative: through the formula in ordinary operations."""
    x, weight, bias, A, B, norm, _, _, dropped, _, magnitude = ctx.saved_tensors
    if ctx.layer is not None:
        raise RuntimeError(
            "No second derivative through DoRA on a quantized base: set use_dora to false, or use "
            "a base that is not quantized."
        )
    with torch.enable_grad():
        out = _composite(x, weight, bias, A, B, magnitude, norm, dropped, ctx.scaling, ctx.dropout)
    inputs = (x, weight, bias, A, B, magnitude)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:6]) if needed]
    found = torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=True)
    grads: list[Tensor | None] = [None] * 11
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)
