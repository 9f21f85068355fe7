"""Running a module's forward with other weights, without touching the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.functional import delta_weight


class StandIn:
    """A module with other values in the place of some of its attributes.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> zero = StandIn(layer, {"weight": torch.zeros(2, 2), "bias": None})
        >>> nn.Linear.forward(zero, torch.ones(2))
        tensor([0., 0.])
    """

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def updated(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
    """``W + s * B @ A``, as a merge computes it."""
    # In the precision of the factors, also under autocast.
    with torch.autocast(A.device.type, enabled=False):
        return summed(weight, delta_weight(A, B, scaling))


def summed(weight: Tensor, update: Tensor) -> Tensor:
    """The sum in the wider dtype, rounded once to the dtype of the weight."""
    return (weight.to(update.dtype) + update).to(weight.dtype)
