"""Why a module cannot be adapted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.bypassed import is_read_by_head, reads_weight
from lightning_lora.errors import TargetError
from lightning_lora.layers import LoRAFactors, LoRALayer, adapted_class, supported_layers
from lightning_lora.names import parameters_of
from lightning_lora.quantization import is_unquantized


def find_obstacles(
    modules: dict[str, nn.Module], dropout: float, use_dora: bool = False
) -> dict[str, str | None]:
    """What stands in the way of adapting each module, or ``None``.

    Args:
        modules: The model's modules by name.
        dropout: Dropout of the adapter's input.
        use_dora: Whether the layers have to take a magnitude.
    """
    return {
        name: _obstacle(name, module, modules, dropout, use_dora)
        for name, module in modules.items()
    }


def _obstacle(
    name: str, module: nn.Module, modules: dict[str, nn.Module], dropout: float, use_dora: bool
) -> str | None:
    if isinstance(module, (LoRALayer, LoRAFactors)):
        return "it has been adapted already"
    adapted = adapted_class(type(module))
    if not name:
        return "it is the model itself; put it into a module, or into nn.Sequential"
    if adapted is None:
        types = ", ".join(supported_layers())
        why = f"{type(module).__name__} is not a supported layer type ({types})"
        if isinstance(module, nn.Linear):
            why += "; it overrides forward, so register a layer class for it with register_layer"
        return why
    if (obstacle := adapted.obstacle(module, dropout)) is not None:
        return obstacle
    if (dtype := _strange_dtype(module)) is not None:
        return (
            f"its weight is in {dtype}, which factors cannot be added to; load it in another dtype"
        )
    if use_dora and not adapted.supports_dora:
        return (
            f"DoRA is not available for {type(module).__name__}, whose forward takes no magnitude; "
            "leave it out with exclude_modules, or set use_dora to false"
        )
    if use_dora and is_unquantized(module):
        return (
            "its weight is quantized only when it is moved to its device, and magnitudes are "
            "measured on the quantized one: move the model first"
        )
    if any(leaf not in module._parameters for leaf in adapted.weights(module)):
        return "its weight is computed by a parametrization, which a merge could not undo"
    if hasattr(module, "lora"):
        return "it has an attribute called lora already"
    outer = attention_around(name, modules)
    if outer is not None:
        why_not = _obstacle(outer, modules[outer], modules, dropout, use_dora)
        if why_not is not None:
            return f"it is run by {outer!r}, which cannot be adapted: {why_not}"
    above, _, leaf = name.rpartition(".")
    if (parent := modules.get(above)) is not None and reads_weight(parent, leaf):
        return (
            f"{type(parent).__name__} reads its weight instead of calling it, so that factors "
            "would have no effect"
        )
    if is_read_by_head(name, modules):
        return "the head reads its weight too, to which factors would be unknown"
    if "forward" in module.__dict__:
        return (
            "its forward was replaced on the instance (by a device map of accelerate, for "
            "instance), which would bypass LoRA; load the model without device_map"
        )
    return None


def _strange_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a parameter that is complex, or of fewer bits than products are computed in."""
    for parameter in module._parameters.values():
        if parameter is not None and is_unsuited(parameter.dtype):
            return parameter.dtype
    return None


def is_unsuited(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype take no update: complex ones, and floats of 8 bits.

    >>> is_unsuited(torch.complex64), is_unsuited(torch.float8_e4m3fn), is_unsuited(torch.float16)
    (True, True, False)
    """
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize < 2)


def attention_around(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Name of the `torch.nn.MultiheadAttention` whose output projection a layer is.

    That one reads the layer's weights instead of calling it.
    """
    outer = name.rpartition(".")[0]
    return outer if isinstance(modules.get(outer), nn.MultiheadAttention) else None


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of several experts in 3-D parameters."""
    return "experts" in type(module).__name__.lower() and any(
        parameter is not None and parameter.ndim == 3 for parameter in module._parameters.values()
    )


def refuse_lazy(modules: Mapping[str, nn.Module]) -> None:
    """Shapes must be known.

    Args:
        modules: The model's modules by name.

    Raises:
        TargetError: Names a parameter without a shape.
    """
    for name, parameter in parameters_of(modules).items():
        if is_lazy(parameter):
            raise TargetError(
                f"The shape of {name!r} is unknown until its module has run: pass one "
                "batch through the model first, or give the layer its sizes."
            )
