"""LoRA on the `Conv1D` of `transformers`, the linear layer of GPT-2 and its relatives."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.dora import dora_linear
from lightning_lora.functional import delta_weight, lora_linear
from lightning_lora.layers.base import LoRALayer, register_layer


@register_layer
class LoRAConv1D(LoRALayer, Conv1D):
    """``y = x W + b + s * D(x) A^T B^T``: a linear layer whose weight is kept transposed.

    Made by swapping the class of a `Conv1D` in place (`lightning_lora.inject_lora`), never by a
    constructor. The input has shape ``(..., in)``, the output ``(..., out)``.

    Attributes:
        weight: The base weight W, shape ``(in, out)``, usually frozen.
        bias: The base bias b, shape ``(out,)``.
        lora: The factors A ``(r, in)`` and B ``(out, r)``.
    """

    base_class = Conv1D
    supports_dora: ClassVar[bool] = True
    out_dim: ClassVar[int] = 1
    weight: Tensor
    bias: Tensor

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, in)`` and ``(out, r)``."""
        assert isinstance(module, Conv1D)
        return (r, module.nx), (module.nf, r)

    def delta_weight(self) -> Tensor:
        """``s * (B @ A)^T``, shape ``(in, out)``."""
        return delta_weight(*self.lora.pair(), self.lora.scaling).t()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        update = lora_linear if self.lora.magnitude is None else dora_linear
        out: Tensor = self.lora(update, x, self.weight.t(), self.bias)
        return out
