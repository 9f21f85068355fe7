"""Activation checkpointing of units."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed._composable import checkpoint


def checkpoint_activations(model: nn.Module, units: Iterable[nn.Module]) -> None:
    """Recompute each unit's activations in backward instead of keeping them.

    A Hugging Face model does it in its own way, which also turns its cache off; any other model
    unit by unit, without a change of names or classes.
    """
    own = [
        module
        for module in model.modules()
        if getattr(module, "supports_gradient_checkpointing", False)
    ]
    for module in own:
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    covered = {id(part) for module in own for part in module.modules()}
    for unit in units:
        if id(unit) not in covered:
            checkpoint(unit)
