"""The layer kinds that can be adapted, one a file."""

from lightning_lora.layers.base import LoRALayer, adapted_class, register_layer, supported_layers
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.factors import LoRAFactors
from lightning_lora.layers.linear import LoRALinear

__all__ = [
    "LoRAEmbedding",
    "LoRAFactors",
    "LoRALayer",
    "LoRALinear",
    "adapted_class",
    "register_layer",
    "supported_layers",
]
