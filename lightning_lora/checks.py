"""What a Trainer must and must not have for LoRA to be right under it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors, Masters
from lightning_lora.names import listed, modules_by_name
from lightning_lora.plan import Plan
from lightning_lora.sharded import is_sharded

_NO_GRADIENT = (
    "Look whether the model runs the adapted layers under torch.no_grad (a frozen backbone), "
    "detaches what they compute, or never calls them; and whether it computes them again in "
    "backward (reentrant activation checkpointing, reversible layers), which needs an input that "
    "requires gradients: gradient_checkpointing_enable({'use_reentrant': False}), or "
    "enable_input_require_grads() of a Hugging Face model."
)


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


def check_finetuning(trainer: Trainer) -> None:
    """Callbacks that freeze and unfreeze layers decide what LoRA decides.

    Raises:
        ConfigError: The Trainer has one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise ConfigError(
                f"{type(callback).__name__} unfreezes layers during the fit, and LoRA trains and "
                "saves the adapter alone. Leave one of the two out; what is to train whole from "
                "the start goes into modules_to_save."
            )


def check_modes(model: LightningModule, dropout: float) -> None:
    """Say so where the adapter's dropout does nothing.

    Args:
        model: An adapted module whose training is about to start.
        dropout: The probability that was asked for.
    """
    factors = [module for module in model.modules() if isinstance(module, LoRAFactors)]
    if dropout and factors and not any(module.training for module in factors):
        rank_zero_warn(
            f"dropout={dropout} has no effect: the adapted layers are in evaluation mode, as "
            "Hugging Face's from_pretrained leaves them and Lightning keeps them. Call .train() on "
            "the model in the LightningModule's __init__."
        )


def check_training(model: LightningModule, plan: Plan) -> None:
    """Say which layers have learned nothing in some training.

    Args:
        model: An adapted module whose factors are not sharded.
        plan: What was adapted.
    """
    modules = modules_by_name(model)
    idle = []
    for target in plan.targets:
        lora = modules[target.name].lora
        if target.tied_to is None and not target.keeps_start and isinstance(lora, LoRAFactors):
            zero: Any = getattr(lora, lora.zero)
            if lora.init != "orthogonal" and not zero.any():
                idle.append(target.name)
    # Where none has learned, it is the learning rate of a warm-up.
    if 0 < len(idle) < len(plan.targets):
        rank_zero_warn(
            f"{len(idle)} adapted layers have learned nothing so far: {listed(idle, limit=3)}. "
            "Either the model never calls them, or something reads their weights instead. Leave "
            "them out with exclude_modules."
        )


def check_loss(loss: Tensor) -> None:
    """A loss that depends on nothing that trains has no backward pass.

    Raises:
        ConfigError: It does not require a gradient.
    """
    if not loss.requires_grad:
        raise ConfigError(
            "The loss does not depend on anything that trains: neither the factors nor another "
            f"trained parameter had a part in it. {_NO_GRADIENT}"
        )


def check_gradients(model: LightningModule, optimizer: Any) -> bool:
    """Say so where a step is about to be made and no factor has a gradient.

    Args:
        model: An adapted module, after a backward pass.
        optimizer: The optimizer that is about to make a step.

    Returns:
        Whether the optimizer has factors, so that this has been looked at.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors = [
        parameter
        for module in model.modules()
        if isinstance(module, Masters)
        for parameter in module.parameters(recurse=False)
        # FSDP1 leaves the parts that other ranks hold empty.
        if parameter.requires_grad and parameter.numel() and id(parameter) in owned
    ]
    if factors and all(parameter.grad is None for parameter in factors):
        rank_zero_warn(
            f"None of the {len(factors)} factors has a gradient at the optimizer's first step, so "
            f"the adapted layers learn nothing. {_NO_GRADIENT}"
        )
    return bool(factors)


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
