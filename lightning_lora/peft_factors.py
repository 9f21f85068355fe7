"""The factors of one layer as PEFT keeps them, where that differs."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_lora.errors import CheckpointError
from lightning_lora.plan import Target


def peft_multiple(module: nn.Module, target: Target) -> int:
    """How often the rank r goes into the rank that the layer has in PEFT.

    PEFT has no factors for parts of a layer: k parts of rank r become factors of rank ``k * r`` for
    the whole of it, with zeros where a part does not reach.
    """
    if target.slices is not None:
        return len(target.slices.adapted)
    return module.groups if isinstance(module, _ConvNd) else 1


def peft_alpha(module: nn.Module, target: Target, use_rslora: bool) -> float:
    """The alpha that gives the same scaling with PEFT's rank."""
    k = peft_multiple(module, target)
    return target.alpha * (math.sqrt(k) if use_rslora else k)


def peft_factor(module: nn.Module, target: Target, leaf: str, value: Tensor) -> tuple[str, Tensor]:
    """PEFT's name (behind the layer's) and value of a factor.

    Args:
        module: The adapted layer, or what it is without LoRA.
        target: Its target.
        leaf: ``"A"`` or ``"B"``.
        value: The factor, whole.

    Raises:
        CheckpointError: PEFT computes something else with this layer.
    """
    if target.slices is not None and leaf == "B":
        value = target.slices.spread(value)
    if isinstance(module, nn.Embedding):
        return f"lora_embedding_{leaf}", value
    if isinstance(module, _ConvNd):
        _refuse_convolution(module, target)
        if leaf == "A":
            value = _over_all_channels(value, module.groups)
    return f"lora_{leaf}.weight", value


def _over_all_channels(A: Tensor, groups: int) -> Tensor:
    """A grouped convolution, shape ``(g * r, in / g, ...)``, as one over all channels, shape
    ``(g * r, in, ...)``: PEFT groups B alone.
    """
    channels = A.shape[1]
    wide = A.new_zeros(A.shape[0], groups * channels, *A.shape[2:])
    for number, (rows, block) in enumerate(zip(wide.chunk(groups), A.chunk(groups), strict=True)):
        rows[:, number * channels : (number + 1) * channels] = block
    return wide


def _refuse_convolution(module: _ConvNd, target: Target) -> None:
    for name, plain in (("dilation", 1), ("padding_mode", "zeros")):
        value = getattr(module, name)
        if any(part != plain for part in (value if isinstance(value, tuple) else (value,))):
            raise CheckpointError(
                f"PEFT leaves {name} out of the factors of a convolution, and {target.name!r} has "
                f"{name}={value}: PEFT would compute something else. Export the merged model."
            )
