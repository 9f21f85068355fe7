"""LoRA on the linear layer of Falcon, which adds its bias apart."""

from __future__ import annotations

from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconLinear

from lightning_lora.dora import dora_linear
from lightning_lora.functional import lora_linear
from lightning_lora.layers.base import register_layer
from lightning_lora.layers.linear import LoRALinear


@register_layer
class LoRAFalconLinear(LoRALinear, FalconLinear):
    """As `LoRALinear`, but the bias is added to the rounded product, as `FalconLinear` does."""

    base_class = FalconLinear

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        update = lora_linear if self.lora.magnitude is None else dora_linear
        out: Tensor = self.lora(update, input, self.weight, None)
        return out if self.bias is None else out + self.bias
