"""LoRA for PyTorch Lightning: one callback that injects, trains, checkpoints the adapter alone, and
merges.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lora.adapter_set import (
        active_adapter,
        adapter_names,
        add_adapter,
        delete_adapter,
        set_adapter,
    )
    from lightning_lora.callback import LoRACallback
    from lightning_lora.combining import add_weighted_adapter
    from lightning_lora.comparison import validate_merged
    from lightning_lora.config import LoRAConfig
    from lightning_lora.fused import register_fused
    from lightning_lora.initialization.inputs import initialize_from_inputs
    from lightning_lora.initialization.ranks import redistribute_ranks
    from lightning_lora.injection import inject_lora
    from lightning_lora.interop import load_adapter, save_adapter
    from lightning_lora.layers import LoRALayer, register_layer
    from lightning_lora.loading import load_lightning_module
    from lightning_lora.merging import merge_lora, unmerge_lora
    from lightning_lora.per_row import adapter_per_row
    from lightning_lora.plan import Plan
    from lightning_lora.pretrained import pretrained_on_meta
    from lightning_lora.removal import remove_lora
    from lightning_lora.scaling import adapter_scaled, scale_adapter
    from lightning_lora.state import adapter_state_dict, load_adapter_state_dict
    from lightning_lora.strategies import FSDP2Strategy
    from lightning_lora.swapping import swap_adapter

__version__ = "0.1.0"

__all__ = [
    "FSDP2Strategy",
    "LoRACallback",
    "LoRAConfig",
    "LoRALayer",
    "Plan",
    "active_adapter",
    "adapter_names",
    "adapter_per_row",
    "adapter_scaled",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "initialize_from_inputs",
    "inject_lora",
    "load_adapter",
    "load_adapter_state_dict",
    "load_lightning_module",
    "merge_lora",
    "pretrained_on_meta",
    "redistribute_ranks",
    "register_fused",
    "register_layer",
    "remove_lora",
    "save_adapter",
    "scale_adapter",
    "set_adapter",
    "swap_adapter",
    "unmerge_lora",
    "validate_merged",
]

# Importing torch and Lightning takes seconds; `lightning-lora --help` needs neither.
_HOMES = {
    "FSDP2Strategy": "lightning_lora.strategies",
    "LoRACallback": "lightning_lora.callback",
    "LoRAConfig": "lightning_lora.config",
    "LoRALayer": "lightning_lora.layers",
    "Plan": "lightning_lora.plan",
    "active_adapter": "lightning_lora.adapter_set",
    "adapter_names": "lightning_lora.adapter_set",
    "adapter_per_row": "lightning_lora.per_row",
    "adapter_scaled": "lightning_lora.scaling",
    "adapter_state_dict": "lightning_lora.state",
    "add_adapter": "lightning_lora.adapter_set",
    "add_weighted_adapter": "lightning_lora.combining",
    "delete_adapter": "lightning_lora.adapter_set",
    "initialize_from_inputs": "lightning_lora.initialization.inputs",
    "inject_lora": "lightning_lora.injection",
    "load_adapter": "lightning_lora.interop",
    "load_adapter_state_dict": "lightning_lora.state",
    "load_lightning_module": "lightning_lora.loading",
    "merge_lora": "lightning_lora.merging",
    "pretrained_on_meta": "lightning_lora.pretrained",
    "redistribute_ranks": "lightning_lora.initialization.ranks",
    "register_fused": "lightning_lora.fused",
    "register_layer": "lightning_lora.layers",
    "remove_lora": "lightning_lora.removal",
    "save_adapter": "lightning_lora.interop",
    "scale_adapter": "lightning_lora.scaling",
    "set_adapter": "lightning_lora.adapter_set",
    "swap_adapter": "lightning_lora.swapping",
    "unmerge_lora": "lightning_lora.merging",
    "validate_merged": "lightning_lora.comparison",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
