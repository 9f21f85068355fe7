"""The mathematics of LoRA as pure functions on tensors.

`lora_linear` computes ``y = x W^T + b + s * D(x) A^T B^T`` (arXiv:2106.09685, equation 3; D is
dropout). While only the factors (and perhaps b) train, it runs as one autograd node that keeps
``x`` and the skinny ``A D(x)^T`` and nothing of the size of the output, computes the skinny
products in the transposed layout that BLAS libraries handle best, and folds every scale into the
product that follows it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_lora.dropout import draw_dropped, zero_dropped, zero_dropped_


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
    dtype = _compute_dtype(x)
    dropped = draw_dropped(x, dropout) if dropout > 0 else None
    update_scaling = scaling / (1 - dropout)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, A, B, dropped, update_scaling, dtype)[0]
    if weight.requires_grad:
        return _plain_lora_linear(x, weight, bias, A, B, dropped, update_scaling, dtype)
    out: Tensor = _LoRALinear.apply(x, weight, bias, A, B, dropped, update_scaling, dtype)
    return out


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The update ``s * B @ A``, shape ``(out, in)``, in the dtype of the factors."""
    return torch.mm(B * scaling, A)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    # Autocast leaves double precision alone.
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _plain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    dropped: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """The formula in ordinary operations; ``scaling`` includes dropout's ``1 / (1 - p)``."""
    out = F.linear(x, weight, bias)
    adapter_in = x if dropped is None else zero_dropped(x, dropped)
    hidden = F.linear(adapter_in.to(dtype), A.to(dtype))
    return out + F.linear(hidden, B.to(dtype)) * scaling


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    dropped: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output and ``H = A X^T``, without autograd."""
    # F.linear on the input as it came: the base's own result, bit for bit, under autocast too.
    out = F.linear(x, weight, bias)
    rows = math.prod(x.shape[:-1])
    adapter_in = x.to(dtype) if dropped is None else zero_dropped(x.to(dtype), dropped)
    hidden_t = torch.mm(A.to(dtype), adapter_in.reshape(rows, x.shape[-1]).t())
    flat = out.reshape(rows, weight.shape[0])
    flat.addmm_(hidden_t.t(), B.to(dtype).t(), alpha=scaling)
    # Autograd refuses in-place changes of a custom function's output when it is a view.
    return torch.ops.aten._unsafe_view(flat, out.shape), hidden_t


class _LoRALinear(torch.autograd.Function):
    """`_plain_lora_linear` for a frozen weight, with a hand-written backward.

    With ``H = A X^T`` (r x N) and the gradient ``G`` (N x out): ``dX = G W + s (B^T G^T)^T A``,
    ``dA = s (B^T G^T) X`` and ``dB = s (H G)^T``, where X is the input after dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        dropped: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out, hidden_t = _forward(x, weight, bias, A, B, dropped, scaling, dtype)
        ctx.save_for_backward(x, weight, A, B, hidden_t, dropped)
        ctx.scaling, ctx.dtype = scaling, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, hidden_t, dropped = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Double backward: hidden_t is a constant to autograd, so everything is derived again
            # from the inputs. The bias enters linearly, so its gradient needs no input of its own.
            hidden_t = None
        grads = lora_linear_grads(
            grad, x, weight, A, B, hidden_t, dropped, ctx.scaling, ctx.dtype, ctx.needs_input_grad
        )
        grad_x, grad_A, grad_B = grads
        grad_bias = None
        if ctx.needs_input_grad[2]:
            rows = math.prod(grad.shape[:-1])
            grad_bias = grad.reshape(rows, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None


def lora_linear_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    hidden_t: Tensor | None,
    dropped: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B; in-place on its own temporaries unless ``hidden_t`` is ``None``.

    The weight is needed for the gradient of x alone.
    """
    rows = math.prod(x.shape[:-1])
    differentiable = hidden_t is None
    g = grad.reshape(rows, grad.shape[-1]).to(dtype)
    A_c, B_c = A.to(dtype), B.to(dtype)
    adapter_in = x.to(dtype).reshape(rows, x.shape[-1])
    if dropped is not None:
        drop = dropped.view(adapter_in.shape) if dropped.dtype == torch.bool else dropped
        adapter_in = zero_dropped(adapter_in, drop)
    if hidden_t is None:
        hidden_t = torch.mm(A_c, adapter_in.t())
    grad_hidden_t = torch.mm(B_c.t(), g.t())

    grad_x = grad_A = grad_B = None
    if needs[3]:
        grad_A = torch.mm(grad_hidden_t, adapter_in).mul(scaling).to(A.dtype)
    if needs[4]:
        grad_B = torch.mm(hidden_t, g).t().mul(scaling).to(B.dtype)
    if needs[0]:
        assert weight is not None
        base = torch.mm(g, weight.to(dtype))
        if dropped is None and not differentiable:
            grad_x = base.addmm_(grad_hidden_t.t(), A_c, alpha=scaling)
        else:
            update = torch.mm(grad_hidden_t.t(), A_c).mul(scaling)
            if dropped is not None:
                zero = zero_dropped if differentiable else zero_dropped_
                update = zero(update, drop)
            grad_x = base + update
        grad_x = grad_x.reshape(x.shape).to(x.dtype)
    return grad_x, grad_A, grad_B
