"""The weights of a base model on disk, read one by one."""

from __future__ import annotations

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
        files = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        files = [file for file in files if file.name != _ADAPTER]
        if not files:
            raise CheckpointError(
                f"{folder} holds no .safetensors files of a base model. Give the folder that the "
                "model was loaded from."
            )
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as content:
                    self._files |= dict.fromkeys(content.keys(), file)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} could not be read: it is damaged ({error})."
                ) from error

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


def is_plain(tensor: Tensor) -> bool:
    """Whether the values are the weights themselves and no quantization of them."""
    return tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
