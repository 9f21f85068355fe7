"""A LightningModule from an adapter checkpoint, without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.interop import load_adapter
from lightning_lora.merging import merge_lora

M = TypeVar("M", bound=LightningModule)


def load_lightning_module(
    cls: type[M], checkpoint_path: str | Path, *, merge: bool = True, **hyperparameters: Any
) -> M:
    """Build a LightningModule, inject LoRA with the checkpoint's settings and load the adapter.

    ``LightningModule.load_from_checkpoint`` cannot do this: it runs no callbacks, so the adapter's
    keys would be unexpected, or with ``strict=False`` silently left out. The model may be built in
    ``__init__``, in ``setup`` (called with ``"predict"``) or in ``configure_model``.

    Args:
        cls: The class of the LightningModule.
        checkpoint_path: A checkpoint that `LoRACallback` wrote.
        merge: Merge the adapter, so that inference runs through plain layers.
        **hyperparameters: Arguments of ``cls``, over those saved in the checkpoint by
            ``save_hyperparameters``.

    Returns:
        The module on the CPU, in evaluation mode.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or does not fit the module.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    saved = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
    # LightningCLI adds how it built the module, as keys with a leading underscore.
    arguments = {key: value for key, value in saved.items() if not key.startswith("_")}
    module = cls(**{**arguments, **hyperparameters})
    if is_overridden("setup", module):
        module.setup("predict")
    module.configure_model()
    load_adapter(module, checkpoint_path)
    module.on_load_checkpoint(checkpoint)
    if merge:
        merge_lora(module)
    return module.eval()
