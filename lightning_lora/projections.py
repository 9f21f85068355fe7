"""Linear layers of one input with low-rank updates, as one autograd node.

With ``H = s X A^T`` (N x r, X after dropout) a layer is ``Y = X W^T + b + H B^T``. Given the
gradient ``G`` of Y and ``E = s G B`` (N x r): ``dX = G W + E A``, ``dA = E^T X``, ``dB = G^T H``.
Layers of one input share the products with X: their A stand one on another, so that X is read once
for all H and once for all dA, and dX is summed in place.

The products with r columns take far less arithmetic than memory traffic, so everything here is
ordered to read a large tensor while it is still in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_lora.dropout import zero_dropped, zero_dropped_
from lightning_lora.scratch import cast_for_now, copy_for_now

# Up to this many columns the product with A is faster transposed, in pieces of X of this size in
# bytes, which stay in the second-level cache. Measured on CPUs in float32.
TRANSPOSED_COLUMNS = 8
TRANSPOSED_BYTES = 2**21

_Optional = Sequence[Tensor | None]


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: _Optional,
    A: Tensor,
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropped: _Optional,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The outputs of the layers and all H side by side, without autograd.

    Args:
        x: Input, shape ``(..., in)``, in the dtype of the computation.
        weights: Base weights, each ``(out, in)``.
        biases: Base biases, each ``(out,)`` or ``None``.
        A: The factors A one on another, shape ``(sum of r, in)``, in the dtype of ``x``.
        Bs: The factors B, each ``(out, r)``, in the dtype of ``x``.
        scalings: The factors s.
        dropped: What dropout removes of the input of each A; see `lightning_lora.dropout`.

    Returns:
        The outputs, each ``(..., out)``; H, shape ``(N, sum of r)``.
    """
    shape = x.shape[:-1]
    rows = math.prod(shape)
    flat = x.reshape(rows, x.shape[-1])
    autocast = torch.is_autocast_enabled(x.device.type)
    parts: list[Tensor] = []
    outs = []
    for index, (weight, bias, B) in enumerate(zip(weights, biases, Bs, strict=True)):
        if autocast:
            # What autocast would cast, without a copy that is kept for backward.
            weight = cast_for_now(weight, x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        # The base's own result, bit for bit.
        out = F.linear(x, weight, bias)
        if not parts:
            hidden = _hidden(flat, A, Bs, dropped)
            parts = _split(hidden, Bs)
            _scale_(hidden, parts, scalings)
        features = B.shape[0]
        out = out.reshape(rows, features)
        out.addmm_(parts[index], B.t())
        # Autograd refuses in-place changes of a custom function's output when it is a view.
        outs.append(torch.ops.aten._unsafe_view(out, (*shape, features)))
    return tuple(outs), hidden


def factors_in(
    dtype: torch.dtype, As: Sequence[Tensor], Bs: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The factors as `project` takes them: the A one on another, and each B."""
    A = As[0] if len(As) == 1 else torch.cat(list(As))
    return A.to(dtype), Bs if Bs[0].dtype == dtype else [B.to(dtype) for B in Bs]


def _split(hidden: Tensor, Bs: Sequence[Tensor]) -> list[Tensor]:
    """The columns that belong to each B."""
    return [hidden] if len(Bs) == 1 else list(hidden.split([B.shape[1] for B in Bs], dim=1))


def _scale_(whole: Tensor, parts: Sequence[Tensor], scalings: Sequence[float]) -> None:
    if all(scaling == scalings[0] for scaling in scalings):
        whole.mul_(scalings[0])
        return
    for part, scaling in zip(parts, scalings, strict=True):
        part.mul_(scaling)


class JoinedProjections(torch.autograd.Function):
    """`project` for frozen weights, and for factors of any dtype.

    Its tensors are those of all layers by kind: weights, biases, A, B and what dropout removes.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        weights, biases, As, Bs, dropped = (
            tensors[start : start + count] for start in range(0, 5 * count, count)
        )
        A, used = factors_in(x.dtype, As, Bs)  # type: ignore[arg-type]
        outs, hidden = project(x, weights, biases, A, used, scalings, dropped)  # type: ignore[arg-type]
        # X is large, and of no use for frozen A; casts of the factors are small.
        keeps_x = any(ctx.needs_input_grad[2 + 2 * count : 2 + 3 * count])
        casts = () if A.dtype == As[0].dtype else (A, *used)  # type: ignore[union-attr]
        ctx.save_for_backward(x if keeps_x else None, hidden, *weights, *As, *Bs, *dropped, *casts)
        ctx.scalings, ctx.shape = scalings, x.shape
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.done = False
        ctx.set_materialize_grads(False)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: D102
        ctx.done = True
        scalings, needs = ctx.scalings, ctx.needs_input_grad
        count = len(scalings)
        x, hidden, *tensors = ctx.saved_tensors
        weights, As, Bs, dropped = (
            tensors[start : start + count] for start in range(0, 4 * count, count)
        )
        grad_x: Tensor | None
        if torch.is_grad_enabled():
            grad_x, grads_A, grads_B = _differentiable_grads(
                x, weights, As, Bs, dropped, scalings, grads
            )
        else:
            casts = tensors[4 * count :]
            A, used = (casts[0], casts[1:]) if casts else factors_in(hidden.dtype, As, Bs)
            grad_x, grads_A, grads_B = projection_grads(
                ctx.shape, x, hidden, weights, A, used, dropped, scalings, grads, needs[0]
            )
            if casts:
                grads_A = [None if g is None else g.to(As[0].dtype) for g in grads_A]
                grads_B = [None if g is None else g.to(Bs[0].dtype) for g in grads_B]
        nothing = (None,) * count
        grads_bias: Any = nothing
        if any(needs[2 + count : 2 + 2 * count]):
            # A bias enters linearly, so that a second derivative needs no more than this.
            grads_bias = [
                None if dtype is None or grad is None else _sum_rows(grad, ctx.shape, dtype)
                for dtype, grad in zip(ctx.bias_dtypes, grads, strict=True)
            ]
        return grad_x, None, *nothing, *grads_bias, *grads_A, *grads_B, *nothing


def projection_grads(
    shape: torch.Size,
    x: Tensor | None,
    hidden: Tensor,
    weights: Sequence[Tensor | None],
    A: Tensor,
    Bs: Sequence[Tensor],
    dropped: _Optional,
    scalings: Sequence[float],
    grads: _Optional,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x, of each A and of each B, without autograd.

    Args:
        shape: Shape of x.
        x: The input of `project`, or ``None`` where no A needs a gradient.
        hidden: What `project` has returned beside the outputs.
        weights: As for `project`; they are needed for the gradient of x alone.
        A: As for `project`.
        Bs: As for `project`.
        dropped: As for `project`.
        scalings: The factors s.
        grads: The gradient of each output, or ``None`` where there is none.
        needs_x: Whether x needs a gradient.
    """
    rows, dtype = math.prod(shape[:-1]), hidden.dtype
    count = len(scalings)
    grad_x: Tensor | None = None
    sides: list[Tensor] = []
    grads_B: list[Tensor | None] = [None] * count
    parts = _split(hidden, Bs)
    for index, (grad, B) in enumerate(zip(grads, Bs, strict=True)):
        if grad is None:
            sides.append(hidden.new_zeros(rows, B.shape[1]))
            continue
        g = grad.reshape(rows, B.shape[0]).to(dtype)
        sides.append(skinny(g, B.t()))
        grads_B[index] = torch.mm(parts[index].t(), g).t()
        weight = weights[index]
        if needs_x and weight is not None:
            weight = cast_for_now(weight, dtype)
            grad_x = torch.mm(g, weight) if grad_x is None else grad_x.addmm_(g, weight)
    flat = None if x is None else x.reshape(rows, x.shape[-1])
    grads_A: list[Tensor | None] = [None] * count
    side = sides[0] if count == 1 else torch.cat(sides, 1)
    sides = _split(side, Bs)
    _scale_(side, sides, scalings)
    if all(each is None for each in dropped):
        if grad_x is not None:
            grad_x.addmm_(side, A)
        if flat is not None:
            grad_A = torch.mm(side.t(), flat)
            grads_A = [grad_A] if count == 1 else list(grad_A.split([B.shape[1] for B in Bs]))
    else:
        if grad_x is not None:
            _add_masked(grad_x, sides, A, dropped)
        if flat is not None:
            pairs = zip(sides, dropped, strict=True)
            grads_A = [torch.mm(own.t(), _masked(flat, mask)) for own, mask in pairs]
    # None and not zeros: optimizers leave alone what has no gradient.
    grads_A = [None if g is None else own for g, own in zip(grads, grads_A, strict=True)]
    return None if grad_x is None else grad_x.reshape(shape), grads_A, grads_B


def skinny(x: Tensor, M: Tensor) -> Tensor:
    """``x M^T`` for a matrix of few rows, in the layout that is fastest.

    Args:
        x: Shape ``(N, k)``.
        M: Shape ``(r, k)``.

    Returns:
        Shape ``(N, r)``; perhaps the transpose of what lies in memory.
    """
    if x.dtype != torch.float32 or M.shape[0] > TRANSPOSED_COLUMNS or x.device.type != "cpu":
        return torch.mm(x, M.t())
    rows = max(1, TRANSPOSED_BYTES // (4 * x.shape[1]))
    if torch.compiler.is_compiling() or len(x) <= rows:
        return torch.mm(M, x.t()).t()
    transposed = x.new_empty(M.shape[0], len(x))
    for own, part in zip(transposed.split(rows, dim=1), x.split(rows), strict=True):
        torch.mm(M, part.t(), out=own)
    return transposed.t()


def _hidden(x: Tensor, A: Tensor, Bs: Sequence[Tensor], dropped: _Optional) -> Tensor:
    if all(each is None for each in dropped):
        return skinny(x, A)
    each_A = A.split([B.shape[1] for B in Bs])
    parts = [skinny(_masked(x, mask), own) for own, mask in zip(each_A, dropped, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _add_masked(grad_x: Tensor, sides: Sequence[Tensor], A: Tensor, dropped: _Optional) -> None:
    each_A = A.split([side.shape[1] for side in sides])
    for side, own, mask in zip(sides, each_A, dropped, strict=True):
        if mask is None:
            grad_x.addmm_(side, own)
        elif mask.dtype == torch.bool:
            grad_x.add_(zero_dropped_(torch.mm(side, own), mask))
        else:
            # The few elements that were dropped get nothing: putting them back spares a second
            # tensor of this size.
            kept = grad_x.view(-1).index_select(0, mask)
            grad_x.addmm_(side, own)
            grad_x.view(-1).index_copy_(0, mask, kept)


def _differentiable_grads(
    x: Tensor | None,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    dropped: _Optional,
    scalings: Sequence[float],
    grads: _Optional,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """For a second derivative: everything from the inputs again, nothing in place."""
    if x is None:
        raise RuntimeError(
            "No second derivative through LoRA with a frozen A: its input was not kept. Train A "
            "as well, or compute it from the merged model."
        )
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    grad_x = torch.zeros_like(flat)
    grads_A: list[Tensor | None] = []
    grads_B: list[Tensor | None] = []
    layers = zip(weights, As, Bs, dropped, scalings, grads, strict=True)
    for weight, A, B, mask, scaling, grad in layers:
        if grad is None:
            grads_A.append(None)
            grads_B.append(None)
            continue
        g = grad.reshape(len(flat), grad.shape[-1]).to(x.dtype)
        adapter_in = flat if mask is None else zero_dropped(flat, _flat(mask, flat))
        side = torch.mm(g, B.to(x.dtype)) * scaling
        hidden = torch.mm(adapter_in, A.to(x.dtype).t())
        update = torch.mm(side, A.to(x.dtype))
        if mask is not None:
            update = zero_dropped(update, _flat(mask, flat))
        grad_x = grad_x + torch.mm(g, weight.to(x.dtype)) + update
        grads_A.append(torch.mm(side.t(), adapter_in).to(A.dtype))
        grads_B.append((torch.mm(g.t(), hidden) * scaling).to(B.dtype))
    return grad_x.reshape(x.shape), grads_A, grads_B


def _sum_rows(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return grad.reshape(math.prod(shape[:-1]), grad.shape[-1]).sum(0).to(dtype)


def _flat(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(x.shape) if mask.dtype == torch.bool else mask


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with the dropped elements at zero, to be used before anything else is copied so."""
    if mask is None:
        return x
    copy = copy_for_now(x)
    return zero_dropped(x, _flat(mask, x)) if copy is None else zero_dropped_(copy, mask)
