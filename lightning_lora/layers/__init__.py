"""The layer kinds that can be adapted, one a file."""

from lightning_lora.layers.attention import LoRAMultiheadAttention
from lightning_lora.layers.base import LoRALayer, adapted_class, register_layer, supported_layers
from lightning_lora.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.experts import LoRAExperts
from lightning_lora.layers.factors import LoRAFactors
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.masters import Masters

__all__ = [
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAFactors",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "Masters",
    "adapted_class",
    "register_layer",
    "supported_layers",
]
