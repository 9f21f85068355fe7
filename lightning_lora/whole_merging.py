"""Merging an adapter on disk into a base whose files join or split the model's parameters, as those
of mixtures of experts do: only the model's own loading understands them, so it is loaded whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import CheckpointError, LightningLoRAError, first_line
from lightning_lora.export import untied_config, without_progress_bar
from lightning_lora.injection import inject_lora
from lightning_lora.merging import merge_lora
from lightning_lora.metadata import audit_metadata
from lightning_lora.names import listed
from lightning_lora.skeleton import Skeleton, around
from lightning_lora.state import load_adapter_state_dict, trained_shapes
from lightning_lora.stored import StoredAdapter


def load_whole(
    adapter: StoredAdapter, skeleton: Skeleton, folder: Path, dtype: torch.dtype | None
) -> nn.Module:
    """Load the base, adapt it and load the adapter.

    Args:
        adapter: The adapter.
        skeleton: Its model without weights.
        folder: The base's folder.
        dtype: What the base is loaded in where the adapter does not know it; by default as stored.

    Returns:
        The module that has the names of the adapter.

    Raises:
        CheckpointError: The base is damaged or incomplete, or another one.
    """
    own = {name.removeprefix(skeleton.prefix) for name in trained_shapes(skeleton.injection)}
    try:
        with without_progress_bar():
            model, report = type(skeleton.model).from_pretrained(
                folder,
                config=skeleton.config,
                dtype=skeleton.dtype or dtype or "auto",
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds
        reason = first_line(error, most=None)
        raise CheckpointError(f"The base {folder} could not be loaded: {reason}") from error
    missing = sorted(set(report["missing_keys"]) - own)
    if missing:
        raise CheckpointError(f"{folder} and the adapter hold no {listed(missing, limit=3)}.")
    root = around(model, skeleton.part)
    try:
        inject_lora(root, adapter.config, seed=0, initialize=False)
        if adapter.metadata:
            audit_metadata(root, adapter.metadata, str(adapter.path))
        load_adapter_state_dict(root, adapter.state, str(adapter.path))
    except LightningLoRAError as error:
        raise CheckpointError(str(error)) from error
    return root


def save_whole(
    root: nn.Module, part: str, folder: Path, shard: int, dtype: torch.dtype | None
) -> None:
    """Merge a loaded model, and write it with ``save_pretrained``.

    Args:
        root: From `load_whole`.
        part: Path of the Hugging Face model in it.
        folder: An empty folder.
        shard: The most bytes of a file.
        dtype: Dtype of the result where it was asked for.
    """
    merge_lora(root)
    model: Any = root.get_submodule(part)
    if dtype is not None:
        model.to(dtype)
    with untied_config(model), without_progress_bar():
        model.save_pretrained(folder, max_shard_size=shard)
