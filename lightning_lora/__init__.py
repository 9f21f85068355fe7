"""LoRA for PyTorch Lightning: one callback that injects, trains, checkpoints the adapter alone, and merges."""

from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.injection import inject_lora
from lightning_lora.interop import load_adapter, save_adapter, swap_adapter
from lightning_lora.layers import LoRALayer, register_layer
from lightning_lora.loading import load_lightning_module
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.plan import Plan
from lightning_lora.removal import remove_lora
from lightning_lora.state import adapter_state_dict, load_adapter_state_dict

__version__ = "0.1.0"

__all__ = [
    "LoRACallback",
    "LoRAConfig",
    "LoRALayer",
    "Plan",
    "adapter_state_dict",
    "inject_lora",
    "load_adapter",
    "load_adapter_state_dict",
    "load_lightning_module",
    "merge_lora",
    "register_layer",
    "remove_lora",
    "save_adapter",
    "swap_adapter",
    "unmerge_lora",
]
