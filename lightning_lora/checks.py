"""What a Trainer must and must not have for LoRA to be right under it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.names import listed, modules_by_name
from lightning_lora.sharded import is_sharded
from lightning_lora.trained import saved_modules


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies and precisions under which LoRA would be wrong.

    Raises:
        ConfigError: The strategy shards, quantizes or hands whole models between processes.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    supported = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, FSDPStrategy)
    if not isinstance(strategy, supported) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{name} is not supported by LoRACallback: use one device, or strategy='ddp', 'fsdp2' "
            "or 'fsdp'. Instead of DeepSpeed's ZeRO stages, 'fsdp2' shards parameters, gradients "
            "and optimizer state."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            "Strategies that start their workers from a running process (ddp_spawn, ddp_fork, "
            "ddp_notebook) hand the whole model back and forth, which loses the adapter. Use "
            "strategy='ddp' in a script."
        )
    plugin = strategy.precision_plugin
    if isinstance(plugin, BitsandbytesPrecision) and plugin._linear_cls.__name__ == "_Linear8bitLt":
        raise ConfigError(
            "BitsandbytesPrecision(mode='int8-training') keeps the weights in 16 bits so that they "
            "can train, and LoRA freezes them. Use mode='int8', or 'nf4'."
        )


def quantize(model: LightningModule, plugin: Any, config: LoRAConfig) -> torch.dtype | None:
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


def check_weight_averaging(trainer: Trainer, lora: Callback, built_later: bool) -> None:
    """Callbacks that average weights must copy the adapted model, not the bare one.

    Args:
        trainer: The Trainer.
        lora: The LoRA callback among the Trainer's.
        built_later: Whether the model is built after the callbacks' setup.

    Raises:
        ConfigError: One of them copies the model before LoRA is in place.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks if built_later else callbacks[: callbacks.index(lora)]:
        if isinstance(callback, WeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} copies the model in its setup, before LoRA is in "
                "place. Put LoRACallback before it in the Trainer's callbacks, and build the model "
                "in the LightningModule's __init__."
            )


def check_frozen_dtype(trainer: Trainer, dtype: torch.dtype | None) -> None:
    """Half-precision weights need autocast, or activations in half precision, around them.

    Raises:
        ConfigError: The Trainer computes in full precision.
    """
    if dtype is not None and str(trainer.precision).startswith(("32", "64")):
        raise ConfigError(
            "frozen_dtype needs mixed precision, and the Trainer computes in "
            f"{trainer.precision!r}. Set Trainer(precision='bf16-mixed'), or leave frozen_dtype "
            "out."
        )


def check_optimizers(trainer: Trainer, model: LightningModule) -> None:
    """Every trainable parameter must be in an optimizer; without it B stays zero and nothing
    complains.

    Raises:
        ConfigError: Names the parameters and the usual cause.
    """
    if not trainer.optimizers:
        return
    optimized = {
        id(p)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for optimizer in trainer.optimizers:
        if type(optimizer).__module__.startswith("bitsandbytes."):
            _check_whole(optimizer)
    left_out = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized
    ]
    if left_out:
        raise ConfigError(
            f"{len(left_out)} trainable parameters are in no optimizer and would never change: "
            f"{listed(left_out, limit=3)}. Most likely the optimizer was built before LoRA was "
            "injected (in __init__, or by a top-level 'optimizer:' of LightningCLI). Build it in "
            "configure_optimizers from self.parameters()."
        )


def _check_whole(optimizer: torch.optim.Optimizer) -> None:
    if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"{type(optimizer).__name__} of bitsandbytes cannot update parameters that are shards "
            "(its kernels take plain tensors alone). Use torch.optim.AdamW: the state of sharded "
            "factors is small, and is sharded too."
        )


def check_best_checkpoint(trainer: Trainer) -> ModelCheckpoint:
    """The `ModelCheckpoint` that decides what is best.

    Raises:
        ConfigError: There is none, or it monitors nothing.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    raise ConfigError(
        "merge_from='best' needs a ModelCheckpoint that monitors a metric, for instance "
        "ModelCheckpoint(monitor='val/loss', mode='min'). Add one, or use merge_from='last'."
    )
