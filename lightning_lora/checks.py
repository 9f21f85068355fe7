"""What a Trainer must and must not have for LoRA to be right under it."""

from __future__ import annotations

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

from lightning_lora.errors import ConfigError
from lightning_lora.names import listed


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
    if isinstance(strategy.precision_plugin, BitsandbytesPrecision):
        raise ConfigError("BitsandbytesPrecision is not supported by LoRACallback in this version.")


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
