"""The best checkpoint of a fit: there will be one, it can be read, and it is what is merged."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.checkpoints import explain_unreadable
from lightning_lora.errors import ConfigError
from lightning_lora.strategies import Replicated


def check_best_checkpoint(trainer: Trainer) -> ModelCheckpoint:
    """The `ModelCheckpoint` that decides what is best: the first that monitors a metric.

    Raises:
        ConfigError: There is none, or it keeps no checkpoint.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            if callback.save_top_k == 0:
                raise ConfigError(
                    f"merge_from='best': the ModelCheckpoint that monitors {callback.monitor!r} "
                    "has save_top_k=0 and keeps no checkpoint. Set save_top_k=1, or use "
                    "merge_from='last'."
                )
            return callback
    raise ConfigError(
        "merge_from='best' needs a ModelCheckpoint that monitors a metric, for instance "
        "ModelCheckpoint(monitor='val/loss', mode='min'). Add one, or use merge_from='last'."
    )


def check_hyperparameters(model: LightningModule) -> None:
    """What a checkpoint of this fit holds must be readable, for the best one is read in the end.

    Raises:
        ConfigError: Hyperparameters that are more than tensors and primitives.
    """
    found = {name: value for name, value in model.hparams.items() if not _is_readable(value)}
    if found:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in found.items())
        raise ConfigError(
            f"merge_from='best' reads a checkpoint of this fit, and its hyperparameters hold what "
            f"is not loaded from files: {kinds}. Leave them out with "
            f"self.save_hyperparameters(ignore={sorted(found)}), or save them as text."
        )


def load_best(trainer: Trainer, model: LightningModule, sharding: Replicated) -> None:
    """Give the model what the best checkpoint of a fit holds.

    Args:
        trainer: The Trainer, after the fit.
        model: Its module.
        sharding: How the strategy lays the module out.

    Raises:
        ConfigError: The fit has saved no best checkpoint.
    """
    path = check_best_checkpoint(trainer).best_model_path
    if not path and (getattr(trainer, "fast_dev_run", False) or not trainer.global_step):
        rank_zero_warn(
            "merge_from='best': this fit was none that saves a best checkpoint (fast_dev_run, "
            "or no step), so the weights as they are were merged."
        )
        return
    if not path:
        raise ConfigError(
            "merge_from='best': ModelCheckpoint has saved no best checkpoint in this fit, so "
            "nothing was merged. Let validation run at least once, or use merge_from='last'."
        )
    # By the strategy's own way of reading: the file may lie on remote storage.
    load = partial(trainer.strategy.checkpoint_io.load_checkpoint, weights_only=True)
    with explain_unreadable(path):
        checkpoint = sharding.read(load, path)
    # What the module keeps beside its weights, such as a threshold, belongs to them.
    model.on_load_checkpoint(checkpoint)
    sharding.load_state(model, checkpoint["state_dict"], path)


def _is_readable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # pickling and unpickling raise errors of many kinds
        return False
    return True
