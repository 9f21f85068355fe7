"""Adapting a LightningModule before a fit: quantized, injected, its base known by a fingerprint."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, DoublePrecision
from lightning.pytorch.strategies import Strategy

from lightning_lora.config import LoRAConfig
from lightning_lora.injection import inject_lora, require_injection
from lightning_lora.metadata import base_fingerprint, frozen_parameters
from lightning_lora.names import modules_by_name
from lightning_lora.plan import Plan
from lightning_lora.quantization import quantize_pending
from lightning_lora.trained import saved_modules


def adapt(model: LightningModule, config: LoRAConfig, strategy: Strategy, merge_base: str) -> Plan:
    """Inject into a module that a Trainer is about to set up.

    Args:
        model: A module without LoRA.
        config: The settings.
        strategy: The Trainer's strategy.
        merge_base: What a quantized base is replaced by while it is merged.

    Returns:
        What was adapted.
    """
    dtype = _quantize(model, strategy.precision_plugin, config)
    quantize_pending(model, strategy.root_device)
    if isinstance(strategy.precision_plugin, DoublePrecision):
        # Before a checkpoint is loaded: Lightning converts after that.
        strategy.precision_plugin.convert_module(model)
    plan = inject_lora(model, config, seed=_seed(strategy))
    record = require_injection(model)
    record.merge_base, record.merge_dtype = merge_base, dtype
    # Now, while the base is in its own precision and nothing has been trained.
    if not any(parameter.is_meta for parameter in frozen_parameters(model)):
        base_fingerprint(model)
    return plan


def _quantize(model: LightningModule, plugin: Any, config: LoRAConfig) -> torch.dtype | None:
    """Let `BitsandbytesPrecision` replace the linear layers now, before they are adapted.

    Lightning has it do so later, and it would replace adapted layers by plain quantized ones. What
    trains whole is left out.

    Args:
        model: A module without LoRA.
        plugin: The strategy's precision plugin, of any kind.
        config: The settings.

    Returns:
        The dtype that the plugin casts inputs to, or ``None`` for plugins of other kinds.
    """
    if not isinstance(plugin, BitsandbytesPrecision):
        return None
    saved = saved_modules(modules_by_name(model), config)
    plugin.ignore_modules = set(plugin.ignore_modules) | set(saved)
    plugin.convert_module(model)
    return plugin.dtype


def _seed(strategy: Strategy) -> int:
    """The seed of the factors, the same on all ranks.

    That of `lightning.seed_everything` where it was called: the state of the generator at this
    point depends on the strategy, and the same run should start alike on any number of devices.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return strategy.broadcast(int(torch.randint(2**62, (1,))) if seed is None else int(seed))
