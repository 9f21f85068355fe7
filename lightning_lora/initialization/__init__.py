"""Factors that do not start from a draw and zero: from the base weight, or from data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.initialization.kinds import check_kinds
from lightning_lora.initialization.loftq import (
    initialize_from_error,
    put_anew,
    put_back,
    restore_rounds,
)
from lightning_lora.initialization.spectral import initialize_from_weights, principal_factors
from lightning_lora.layers import LoRAFactors
from lightning_lora.plan import Plan
from lightning_lora.start import keeps_start

__all__ = [
    "check_kinds",
    "initialize",
    "principal_factors",
    "put_anew",
    "put_back",
    "restore_rounds",
]


def initialize(
    model: nn.Module, plan: Plan, factors: Mapping[str, LoRAFactors], config: LoRAConfig
) -> dict[str, nn.Parameter]:
    """Set factors whose initialisation depends on the base weights; others stay as drawn.

    Args:
        model: The model, not adapted yet.
        plan: What is adapted.
        factors: The factors by the name of their target.
        config: The settings.

    Returns:
        The packed weights that further rounds of LoftQ have replaced, by the name of the layer.

    Raises:
        ConfigError: The weights cannot be read, or are not of a kind that the initialisation takes.
    """
    if config.init == "loftq":
        return initialize_from_error(model, plan, factors, config.loftq_iter)
    if keeps_start(config.init):
        initialize_from_weights(model, plan, factors, config.init)
    return {}
