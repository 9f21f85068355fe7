"""What a checkpoint says of the Hugging Face model that was adapted, so that it can be built again
without the code that trained it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_lora.layers import LoRAFactors
from lightning_lora.names import clean_name, modules_by_name
from lightning_lora.quantization import quantized_layers


def hugging_face_part(module: nn.Module, trained: Collection[str]) -> str | None:
    """Path of the one Hugging Face model that holds everything that was trained, or ``None``.

    Args:
        module: A model, or a module around one.
        trained: Names of the trained tensors.
    """
    for name, child in modules_by_name(module).items():
        is_model = hasattr(child, "save_pretrained") and hasattr(child, "config")
        if is_model and all(key.startswith(f"{name}." if name else "") for key in trained):
            return name
    return None


def model_record(module: nn.Module, trained: Collection[str]) -> dict[str, Any] | None:
    """Class, config and dtypes of the Hugging Face model that was adapted, in primitives.

    Args:
        module: A model, or a module around one; adapted and not merged.
        trained: Names of the trained tensors.

    Returns:
        ``part`` (its path in the module), ``class``, ``config`` (without what it says of
        quantization), ``dtype`` (of most matrices) and ``other_dtypes`` (names of parameters below
        the part, by dtype); ``None`` where there is no such model.
    """
    part = hugging_face_part(module, trained)
    if part is None:
        return None
    model: Any = modules_by_name(module)[part]
    if not hasattr(model.config, "to_json_string"):
        return None
    config = json.loads(model.config.to_json_string(use_diff=True))
    for key in ("quantization_config", "transformers_version"):
        config.pop(key, None)
    dtypes = _dtypes(model)
    common = _most_common(model, dtypes)
    others: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        if dtype != common:
            others.setdefault(_name_of(dtype), []).append(name)
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


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of the parameters that are neither factors nor in a quantized layer."""
    left_out = {
        id(p)
        for layer in [
            *(m for m in model.modules() if isinstance(m, LoRAFactors)),
            *quantized_layers(model).values(),
        ]
        for p in layer.parameters()
    }
    return {
        clean_name(name): parameter.dtype
        for name, parameter in model.named_parameters()
        if id(parameter) not in left_out and parameter.is_floating_point()
    }


def _most_common(model: nn.Module, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    matrices: Counter[torch.dtype] = Counter()
    vectors: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(clean_name(name))
        if dtype is not None:
            (matrices if parameter.ndim > 1 else vectors)[dtype] += parameter.numel()
    common = (matrices or vectors).most_common(1)
    return common[0][0] if common else torch.float32


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
