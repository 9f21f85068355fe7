"""Callbacks that average weights: which go together with LoRA, and what their checkpoints hold.

`WeightAveraging` copies the whole model in its setup. It saves the averages under ``state_dict``
and the weights as they are under ``current_model_state``, and loads both as whole models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.names import clean_name

CURRENT = "current_model_state"


def check_weight_averaging(
    trainer: Trainer, lora: Callback, built_later: bool, is_sharded: bool
) -> None:
    """Callbacks that average weights must copy the adapted model, not the bare one.

    Args:
        trainer: The Trainer.
        lora: The LoRA callback among the Trainer's.
        built_later: Whether the module overrides a hook that builds models after the callbacks'
            setup.
        is_sharded: Whether a process holds a part of the model alone.

    Raises:
        ConfigError: One of them copies the model before LoRA is in place, or takes no shards.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for place, callback in enumerate(callbacks):
        if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            continue
        name = type(callback).__name__
        if is_sharded and isinstance(callback, WeightAveraging):
            raise ConfigError(
                f"{name} copies the whole model into each process, and this strategy shards it. "
                "Use strategy='ddp', or leave it out."
            )
        if place < callbacks.index(lora):
            raise ConfigError(
                f"{name} copies the model in its setup, before LoRA is in place. Put LoRACallback "
                "before it in the Trainer's callbacks."
            )
        if built_later:
            raise ConfigError(
                f"{name} copies the model in its setup, before LoRA is in place: the "
                "LightningModule overrides setup or configure_model, so its layers are adapted "
                "after those. Build the model in __init__ and override neither."
            )


def average_from(trainer: Trainer, model: nn.Module) -> None:
    """Let averages that have not begun be of the model as it is now: they were copied in the setup,
    before what the fit starts from was in place.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if not isinstance(callback, WeightAveraging) or average is None:
            continue
        if int(average.n_averaged) == 0:
            copies = dict(average.module.named_parameters())
            for name, parameter in model.named_parameters():
                copies[name].data.copy_(parameter.data)


def keep_adapter(checkpoint: dict[str, Any]) -> None:
    """Leave of the averages in a checkpoint what belongs to the adapter."""
    if CURRENT in checkpoint:
        averages = {clean_name(name): value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {name: averages[name] for name in checkpoint[CURRENT]}


def fill_in_base(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Add the base to a checkpoint with averages, which `WeightAveraging` loads as whole models."""
    if CURRENT not in checkpoint:
        return
    whole = model.state_dict()
    for key in ("state_dict", CURRENT):
        adapter: Mapping[str, Any] = checkpoint[key]
        checkpoint[key] = {
            name: adapter.get(clean_name(name), tensor) for name, tensor in whole.items()
        }
