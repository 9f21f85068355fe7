"""What a checkpoint says of the Hugging Face model that was adapted, so that it can be built again
without the code that trained it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.layers import LoRAFactors
from lightning_lora.names import modules_by_name, parameters_of
from lightning_lora.quantization import quantized_kinds


def hugging_face_part(module: nn.Module, trained: Collection[str]) -> str | None:
    """Path of the one Hugging Face model that holds everything that was trained, or ``None``.

    Args:
        module: A model, or a module around one.
        trained: Names of the trained tensors.
    """
    return _part(modules_by_name(module), trained)


def _part(modules: Mapping[str, nn.Module], trained: Collection[str]) -> str | None:
    for name, child in modules.items():
        # By its class: a module looks for a name that it does not have in many places.
        is_model = hasattr(type(child), "save_pretrained") and hasattr(child, "config")
        if is_model and all(key.startswith(f"{name}." if name else "") for key in trained):
            return name
    return None


def model_record(
    modules: Mapping[str, nn.Module], trained: Collection[str]
) -> dict[str, Any] | None:
    """Class, config and dtypes of the Hugging Face model that was adapted, in primitives.

    Args:
        modules: The modules of a model, or of a module around one, by name; adapted and not merged.
        trained: Names of the trained tensors.

    Returns:
        ``part`` (its path in the module), ``class``, ``config`` (without what it says of
        quantization), ``dtype`` (of most matrices) and ``other_dtypes`` (names of parameters below
        the part, by dtype); ``None`` where there is no such model.
    """
    part = _part(modules, trained)
    if part is None:
        return None
    model: Any = modules[part]
    if not hasattr(model.config, "to_json_string"):
        return None
    config = json.loads(model.config.to_json_string(use_diff=True))
    for key in ("quantization_config", "transformers_version"):
        config.pop(key, None)
    prefix = f"{part}." if part else ""
    parameters = {
        name.removeprefix(prefix): parameter
        for name, parameter in _unquantized(modules).items()
        if name.startswith(prefix)
    }
    common = _most_common(parameters.values())
    others: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.dtype != common:
            others.setdefault(_name_of(parameter.dtype), []).append(name)
    return {
        "part": part,
        "class": type(model).__name__.removeprefix("FSDP"),
        "config": config,
        "dtype": _name_of(common),
        "other_dtypes": others,
    }


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name as `model_record` writes it.

    >>> dtype_named("bfloat16")
    torch.bfloat16
    """
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _unquantized(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The floating-point parameters that are neither factors nor in a quantized layer."""
    kinds: tuple[type[nn.Module], ...] = (LoRAFactors, *quantized_kinds())
    left_out = {
        id(parameter)
        for module in modules.values()
        if isinstance(module, kinds)
        for parameter in module.parameters()
    }
    return {
        name: parameter
        for name, parameter in parameters_of(modules).items()
        if id(parameter) not in left_out and parameter.is_floating_point()
    }


def _most_common(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    matrices: Counter[torch.dtype] = Counter()
    vectors: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        counted = matrices if parameter.ndim > 1 else vectors
        counted[parameter.dtype] += parameter.numel()
    common = (matrices or vectors).most_common(1)
    return common[0][0] if common else torch.float32


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
