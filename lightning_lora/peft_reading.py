"""The files of a folder in PEFT format, read, and their settings of the types that they should be.

Folders come from anywhere, so that nothing in them is taken for granted, and nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError, first_line
from lightning_lora.validation import is_name_list, is_number, is_whole, mapping_problems

WEIGHTS_FILE = "adapter_model.safetensors"
# What older versions of PEFT wrote.
PICKLED_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
# Said in the header of the weights' file: PEFT has no place for it.
INIT = "lightning_lora_init"
# What PEFT takes where the file is silent.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None}


def read_peft_files(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a folder in PEFT format hold, with PEFT's defaults for what the
    settings leave out, and how the factors started where this project wrote them.

    Raises:
        CheckpointError: A file is missing or damaged, or a setting is of another type.
    """
    weights = next((path / f for f in (WEIGHTS_FILE, PICKLED_FILE) if (path / f).is_file()), None)
    missing = [] if (path / CONFIG_FILE).is_file() else [CONFIG_FILE]
    missing += [] if weights is not None else [WEIGHTS_FILE]
    if weights is None or missing:
        raise CheckpointError(
            f"{path} is no adapter folder: {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing."
        )
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors, init = _tensors(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be read: it is damaged ({error}).") from error
    return {**_checked(config, str(path)), INIT: init}, tensors


def _tensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, and how they started, where it says so."""
    if file.name != PICKLED_FILE:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, (opened.metadata() or {}).get(INIT)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that holds something else
        reason = first_line(error)
        raise ValueError(f"{file.name}: {reason}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{file.name} holds something else than tensors by name")
    return dict(content), None


def _checked(config: Any, source: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{source} could not be read: {CONFIG_FILE} holds no settings, but {str(config)[:80]}."
        )
    values = {**_DEFAULTS, **config}
    problems = []
    for name, fits, wanted in (
        ("r", is_whole, "a whole number"),
        ("lora_alpha", is_number, "a number"),
        ("target_modules", _is_pattern, "a regular expression or a list of names"),
        ("exclude_modules", _is_pattern, "a regular expression or a list of names"),
        ("target_parameters", _are_names, "a list of names"),
        ("modules_to_save", _are_names, "a list of names"),
        ("base_model_name_or_path", _is_text, "a name"),
    ):
        if not fits(values.get(name)):
            problems.append(f"{name} must be {wanted}, got {values[name]!r}")
    problems += mapping_problems("rank_pattern", values.get("rank_pattern"), is_whole, "a rank")
    problems += mapping_problems(
        "alpha_pattern", values.get("alpha_pattern"), is_number, "a number"
    )
    if problems:
        raise CheckpointError(
            f"{source} could not be read: in {CONFIG_FILE} " + "; ".join(problems) + "."
        )
    return values


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: object) -> bool:
    return value is None or is_name_list(value, empty=True)


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) or _are_names(value)
