"""DoRA's magnitudes of models whose weights are not there yet when LoRA is injected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.names import unwrap
from lightning_lora.sharded import write


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Measure, once the weights of a model are filled in, the magnitudes that were on the meta
    device before; of a sharded model all ranks together.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoRALayer) and _is_unknown(unwrap(module.lora).magnitude)
    ]
    yield
    for layer in layers:
        magnitude = unwrap(layer.lora).magnitude
        if isinstance(magnitude, nn.Parameter) and not magnitude.is_meta:
            write(magnitude, layer.measure())


def _is_unknown(magnitude: object) -> bool:
    return isinstance(magnitude, nn.Parameter) and magnitude.is_meta
