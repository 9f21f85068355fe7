"""LoRA on the linear layer of Falcon, which adds its bias apart."""

from __future__ import annotations

from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconLinear

from lightning_lora.functional import lora_linear
from lightning_lora.layers.base import register_layer
from lightning_lora.layers.linear import LoRALinear


@register_layer
class LoRAFalconLinear(LoRALinear, FalconLinear):
    """As `LoRALinear`, but the bias is added to the rounded product, as `FalconLinear` does."""

    base_class = FalconLinear

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        out: Tensor = self.lora(lora_linear, input, self.weight, None)
        return out if self.bias is None else out + self.bias
