"""What fused kernels keep for backward, in place of the operations that stand in for them.

Tensors without memory run on no device, and so by none of a device's fused kernels. Attention and
dropout are where that matters: spelled out, attention keeps its matrix of `tokens x tokens`, which
no fused kernel does (FlashAttention, arXiv:2205.14135, section 3.1: the output and one float32 a
row, the logarithm of the softmax's sum), and dropout keeps a mask in the dtype of its input, of
which a GPU needs one byte an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_lora import dropout, functional

DEVICES = ("cpu", "cuda")


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Let functions keep for backward what a device's kernels do, for a while.

    - `torch.nn.functional.scaled_dot_product_attention` is fused on a GPU, and on a CPU where its
      weights have no dropout.
    - `torch.nn.functional.dropout` keeps a mask of bools on a GPU.
    - The dropout of an adapter draws the mask that it would draw on that device.
    - Autocast runs softmax and LayerNorm in float32 on a GPU, and not on a CPU.

    The values computed are meaningless; shapes, dtypes and what is kept are those of the device.
    The functions are replaced where they are looked up, for the whole process: a function mode
    would not reach what checkpoints compute again inside the backward pass.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    stands: list[tuple[Any, str, Callable[..., Any]]] = [
        (
            F,
            "scaled_dot_product_attention",
            partial(_attention, F.scaled_dot_product_attention, device),
        ),
        (functional, "draw_dropped", partial(_dropped, device)),
    ]
    if device == "cuda":
        stands.append((F, "dropout", _dropout))
        stands += [
            (F, name, partial(_in_float32, getattr(F, name))) for name in ("layer_norm", "softmax")
        ]
    originals = [(home, name, getattr(home, name)) for home, name, _ in stands]
    try:
        for home, name, stand in stands:
            setattr(home, name, stand)
        yield
    finally:
        for home, name, original in originals:
            setattr(home, name, original)


def _dropped(device: str, x: Tensor, p: float) -> Tensor:
    if device == "cpu" and p <= dropout.SPARSE_LIMIT:
        drawn = x.new_zeros(dropout.draws_of(x.numel(), p), dtype=torch.int64)
        return drawn[: round(p * x.numel())]
    return x.new_zeros(x.shape, dtype=torch.bool)


def _attention(
    original: Callable[..., Tensor],
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if device == "cpu" and dropout_p > 0:
        with sdpa_kernel(SDPBackend.MATH):
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        # Masks of bools are made additive, in each layer anew.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    out: Tensor = _FusedAttention.apply(query, key, value, attn_mask)
    return out


def _in_float32(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        args = tuple(_widened(arg) for arg in args)
        kwargs = {name: _widened(value) for name, value in kwargs.items()}
    return original(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*query.shape[:-1], value.shape[-1])
        # As the kernels do, rows first and heads second, so that joining the heads copies nothing.
        out = query.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    out: Tensor = _MaskedDropout.apply(input)
    return out


class _MaskedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)
