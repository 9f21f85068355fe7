"""What a merge does to a model's scores."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError


def validate_merged(
    trainer: Trainer,
    model: LightningModule,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
) -> dict[str, dict[str, float]]:
    """Validate a model with its factors unmerged, and merged.

    For a quantized base: the layers of the merged model compute with other weights than those that
    the adapter was trained on, and in another way. Nothing is logged, and no other callback runs.

    Args:
        trainer: The Trainer that has fitted the model, with its `LoRACallback`.
        model: The LightningModule.
        dataloaders: As for ``Trainer.validate``.
        datamodule: As for ``Trainer.validate``.

    Returns:
        The metrics by name, under ``"unmerged"`` and ``"merged"``.

    Raises:
        ConfigError: The Trainer has no `LoRACallback`.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Module(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val/sum", self(batch).sum())
        >>> options = dict(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False)
        >>> quiet = dict(enable_progress_bar=False, enable_model_summary=False)
        >>> lora, module = LoRACallback(r=2, alpha=4, verbose=False), Module()
        >>> trainer = Trainer(callbacks=[lora], **options, **quiet)
        >>> trainer.fit(module)
        >>> scores = validate_merged(trainer, module, torch.ones(4, 1, 32))
        >>> abs(scores["merged"]["val/sum"] - scores["unmerged"]["val/sum"]) < 1e-4
        True
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    lora = next((each for each in callbacks if isinstance(each, LoRACallback)), None)
    if lora is None:
        raise ConfigError("validate_merged: the Trainer has no LoRACallback, so nothing to merge.")
    loggers, measured = trainer.loggers, dict(trainer.callback_metrics)
    data: dict[str, Any] = {"dataloaders": dataloaders, "datamodule": datamodule, "verbose": False}
    try:
        trainer.loggers = []
        trainer.callbacks = [lora]  # type: ignore[attr-defined]
        unmerged = trainer.validate(model, **data)
        with lora.staying_merged(model):
            merged = trainer.validate(model, **data)
    finally:
        trainer.loggers = loggers
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        trainer.callback_metrics.update(measured)
    return {"unmerged": _flat(unmerged), "merged": _flat(merged)}


def _flat(metrics: list[Any]) -> dict[str, float]:
    return {name: float(value) for each in metrics for name, value in each.items()}
