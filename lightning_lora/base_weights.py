"""The weights of a base model on disk, read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError
from lightning_lora.names import corresponding

_ADAPTER = "adapter_model.safetensors"


class BaseWeights:
    """The safetensors files of a folder, by the names of their tensors.

    Args:
        folder: Of a base model, as `save_pretrained` writes it.

    Raises:
        CheckpointError: There are no such files, or one is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        keys = keys_by_file(self.folder)
        if not keys and self.folder.is_dir():
            files = sorted(self.folder.glob("*.safetensors"))
            keys = {file: stored_keys(file) for file in files if file.name != _ADAPTER}
        if not keys:
            raise CheckpointError(
                f"{folder} holds no .safetensors files of a base model. Give the folder that the "
                "model was loaded from."
            )
        self._files = {key: file for file, found in keys.items() for key in found}

    def names_for(self, parameters: Iterable[str]) -> dict[str, str]:
        """What parameters are called here, whatever stands in front of the names; those that are
        not here are left out.
        """
        return corresponding(parameters, self._files)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU.

        Args:
            name: As of `names_for`.
        """
        with safe_open(self._files[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor


def keys_by_file(folder: Path) -> dict[Path, list[str]]:
    """The tensors of a model's folder by the files that `transformers` reads: those of the index,
    or ``model.safetensors``; nothing where there is neither.

    Raises:
        CheckpointError: The index or the file is damaged.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        return {single: stored_keys(single)} if single.is_file() else {}
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} could not be read: it is damaged ({error}).") from error
    keys: dict[Path, list[str]] = {}
    for key, file in places.items():
        keys.setdefault(folder / file, []).append(key)
    return keys


def stored_keys(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} could not be read: it is damaged ({error}).") from error


def is_plain(tensor: Tensor) -> bool:
    """Whether the values are the weights themselves and no quantization of them."""
    return tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
