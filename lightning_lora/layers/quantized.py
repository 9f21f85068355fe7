"""LoRA on linear layers that bitsandbytes has quantized (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from lightning_lora.dora import dora_frozen
from lightning_lora.dropout import draw_dropped, zero_dropped
from lightning_lora.functional import delta_weight
from lightning_lora.layers.base import LoRALayer, register_layer
from lightning_lora.projections import factors_in, projection_grads, skinny
from lightning_lora.quantization import dequantized, weight_shape


class _LoRAQuantized(LoRALayer):
    """What both kinds share: ``y = x W_q^T + b + s * D(x) A^T B^T``."""

    supports_dora: ClassVar[bool] = True
    # Whether the output is cast back to the dtype of the input.
    keeps_dtype: bool

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, in_features)`` and ``(out_features, r)``."""
        out_features, in_features = weight_shape(module)
        return (r, in_features), (out_features, r)

    def delta_weight(self) -> Tensor:
        """``s * B @ A``, shape ``(out_features, in_features)``."""
        return delta_weight(*self.lora.pair(), self.lora.scaling)

    def base_forward(self, x: Tensor) -> Tensor:
        """The quantized layer's own output, in the dtype of its computation; without autograd."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if self.lora.magnitude is not None:
            scaled: Tensor = self.lora(dora_frozen, x, self, self.bias)
            return scaled.to(x.dtype) if self.keeps_dtype else scaled
        out: Tensor = self.lora(_lora_quantized, x, self)
        return out

    def base_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, shape ``(out_features, in_features)``."""
        return dequantized(self, dtype)

    def whole_weight(self) -> Tensor:
        """The same, in the dtype of the factors."""
        return self.base_weight(self.lora.A.dtype)


@register_layer
class LoRALinear4bit(_LoRAQuantized, Linear4bit):
    """LoRA on a 4-bit layer, nf4 or fp4, with or without doubly quantized scales.

    Made by swapping the class of a ``bitsandbytes.nn.Linear4bit`` in place
    (`lightning_lora.inject_lora`), never by a constructor. Only the input is kept for the backward
    pass, in which the weight is dequantized again.

    Attributes:
        weight: The packed base weight, frozen.
        bias: The base bias, shape ``(out_features,)``, or ``None``; it keeps its own dtype.
        lora: The factors A ``(r, in_features)`` and B ``(out_features, r)``, in float32.
    """

    base_class = Linear4bit
    keeps_dtype = True
    weight: Any
    compute_dtype: torch.dtype | None
    compute_type_is_set: bool
    set_compute_type: Any

    def base_forward(self, x: Tensor) -> Tensor:
        """As `Linear4bit` computes, in its ``compute_dtype``."""
        fix_4bit_weight_quant_state_from_module(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        # Unlike there the bias itself is left as it is: it may be a float32 master that trains.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = bitsandbytes.matmul_4bit(
            x, self.weight, bias=bias, quant_state=self.weight.quant_state
        )
        return out


@register_layer
class LoRALinear8bitLt(_LoRAQuantized, Linear8bitLt):
    """LoRA on an 8-bit layer (LLM.int8(), arXiv:2208.07339).

    Made by swapping the class of a ``bitsandbytes.nn.Linear8bitLt`` in place. The layer must hold
    its weights in 8 bits (``has_fp16_weights=False``). The gradient of the input goes through the
    dequantized weight.

    Attributes:
        weight: The base weight in int8, frozen.
        bias: The base bias, shape ``(out_features,)``, or ``None``; it keeps its own dtype.
        lora: The factors A ``(r, in_features)`` and B ``(out_features, r)``, in float32.
    """

    base_class = Linear8bitLt
    keeps_dtype = False
    weight: Any
    state: Any
    init_8bit_state: Any

    @classmethod
    def obstacle(cls, module: nn.Module, dropout: float) -> str | None:
        """A layer that keeps 16-bit weights to train them gains nothing from a frozen base."""
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return (
                "keeps its weights in 16 bits so that they can train (has_fp16_weights=True), and "
                "LoRA freezes them; use has_fp16_weights=False, or mode 'int8' of "
                "BitsandbytesPrecision"
            )
        return None

    def base_forward(self, x: Tensor) -> Tensor:
        """As `Linear8bitLt` computes."""
        self.state.is_training = self.training
        if self.weight.CB is not None:
            self.init_8bit_state()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = bitsandbytes.matmul(x, self.weight, bias=bias, state=self.state)
        if self.state.CB is not None:
            self.weight.data = self.state.CB
        return out


def _lora_quantized(
    x: Tensor, layer: _LoRAQuantized, A: Tensor, B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """The output of an adapted quantized layer; the update's dtype is that of the base's output."""
    dropped = draw_dropped(x, dropout) if dropout > 0 else None
    update_scaling = scaling / (1 - dropout)
    if not torch.is_grad_enabled():
        out, _, dtype = _forward(x, layer, A, B, dropped, update_scaling)
        return out.to(dtype)
    result: Tensor = _LoRAQuantizedLinear.apply(x, layer.bias, A, B, dropped, update_scaling, layer)
    return result


def _forward(
    x: Tensor, layer: _LoRAQuantized, A: Tensor, B: Tensor, dropped: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, torch.dtype]:
    """The output in the dtype of the computation, ``H = s X A^T``, and the dtype to return."""
    out = layer.base_forward(x)
    dtype = out.dtype
    rows = math.prod(x.shape[:-1])
    adapter_in = x.to(dtype) if dropped is None else zero_dropped(x.to(dtype), dropped)
    # Cast back: autocast may not have had its way with the base's output, and has it with this.
    hidden = skinny(adapter_in.reshape(rows, x.shape[-1]), A.to(dtype)).to(dtype).mul_(scaling)
    flat = out.reshape(rows, out.shape[-1])
    flat.addmm_(hidden, B.to(dtype).t())
    # Autograd refuses in-place changes of a custom function's output when it is a view.
    whole = torch.ops.aten._unsafe_view(flat, out.shape)
    return whole, hidden, x.dtype if layer.keeps_dtype else dtype


class _LoRAQuantizedLinear(torch.autograd.Function):
    """`_forward` with a backward that dequantizes the weight; formulas as in `lora_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        dropped: Tensor | None,
        scaling: float,
        layer: _LoRAQuantized,
    ) -> Tensor:
        out, hidden, dtype = _forward(x, layer, A, B, dropped, scaling)
        # The input is needed for the gradient of A alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, A, B, hidden, dropped)
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        # Not the weight: what holds it between two passes (a sharded unit, say) may free it.
        ctx.layer, ctx.scaling, ctx.dtype = layer, scaling, out.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, hidden, dropped = ctx.saved_tensors
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        weight = dequantized(ctx.layer, ctx.dtype) if needs_x else None
        factor, used = factors_in(ctx.dtype, [A], [B])
        grad_x, (grad_A,), (grad_B,) = projection_grads(
            ctx.shape,
            None if x is None else x.to(ctx.dtype),
            hidden,
            [weight],
            factor,
            used,
            [dropped],
            [ctx.scaling],
            [grad],
            needs_x,
        )
        grad_x, grad_A, grad_B = (
            grad if grad is None else grad.to(dtype)
            for grad, dtype in ((grad_x, ctx.x_dtype), (grad_A, A.dtype), (grad_B, B.dtype))
        )
        grad_bias = None
        if needs_bias:
            rows = math.prod(grad.shape[:-1])
            # Summed in the bias's own precision.
            flat = grad.reshape(rows, grad.shape[-1])
            grad_bias = flat.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, grad_A, grad_B, None, None, None
