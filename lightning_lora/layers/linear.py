"""LoRA on `torch.nn.Linear`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.dora import dora_linear
from lightning_lora.functional import delta_weight, lora_linear, prefers_operations
from lightning_lora.layers.base import LoRALayer, register_layer
from lightning_lora.layers.siblings import Siblings


@register_layer
class LoRALinear(LoRALayer, nn.Linear):
    """``y = x W^T + b + s * D(x) A^T B^T`` (arXiv:2106.09685, equation 3).

    Made by swapping the class of an `torch.nn.Linear` in place (`lightning_lora.inject_lora`),
    never by a constructor. The input has shape ``(..., in_features)``, the output ``(...,
    out_features)``.

    Attributes:
        weight: The base weight W, shape ``(out_features, in_features)``, usually frozen.
        bias: The base bias b, shape ``(out_features,)``, or ``None``.
        lora: The factors A ``(r, in_features)`` and B ``(out_features, r)``.
    """

    base_class = nn.Linear
    supports_dora: ClassVar[bool] = True

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, in_features)`` and ``(out_features, r)``."""
        assert isinstance(module, nn.Linear)
        return (r, module.in_features), (module.out_features, r)

    def delta_weight(self) -> Tensor:
        """``s * B @ A``, shape ``(out_features, in_features)``."""
        return delta_weight(*self.lora.pair(), self.lora.scaling)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        siblings: Siblings | None = self.__dict__.get("siblings")
        if siblings is None or torch.compiler.is_compiling():
            return self._alone(input)
        if not torch.is_grad_enabled() or prefers_operations(input, self.weight):
            siblings.let_go()
            return self._alone(input)
        out = siblings.output(self, input)
        if out is None:
            out = self._alone(input)
            siblings.note(self, out)
        return out

    def _alone(self, input: Tensor) -> Tensor:
        update = lora_linear if self.lora.magnitude is None else dora_linear
        out: Tensor = self.lora(update, input, self.weight, self.bias)
        return out
