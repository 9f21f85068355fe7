"""An adapter on disk as it stands there, with what its file says of the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.config import LoRAConfig
from lightning_lora.directories import is_directory
from lightning_lora.errors import CheckpointError, first_line
from lightning_lora.metadata import METADATA_KEY
from lightning_lora.peft_format import from_peft_config, from_peft_tensors
from lightning_lora.peft_reading import read_peft_files
from lightning_lora.weight_files import model_folder


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter on disk holds.

    Attributes:
        path: Where it lies.
        config: Its settings.
        state: Its tensors by name.
        checkpoint: The Lightning checkpoint; empty for a folder in PEFT format.
        peft: The ``adapter_config.json`` of a folder in PEFT format; else empty.
    """

    path: Path
    config: LoRAConfig
    state: Mapping[str, Tensor]
    checkpoint: Mapping[str, Any]
    peft: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What a checkpoint says about its adapter; empty for a folder in PEFT format."""
        found: Mapping[str, Any] = self.checkpoint.get(METADATA_KEY, {})
        return found

    @property
    def base(self) -> Mapping[str, Any]:
        """What a checkpoint says about its base; empty for a folder in PEFT format."""
        found: Mapping[str, Any] = self.metadata.get("base", {})
        return found

    @property
    def record(self) -> Mapping[str, Any] | None:
        """The model as `model_record` describes it; ``None`` where nothing was recorded."""
        return self.base.get("model")

    @property
    def base_name(self) -> str | None:
        """Folder or hub name of the base: the one that is there, of those that are known."""
        names = (
            self.base.get("name_or_path"),
            self.checkpoint.get("hyper_parameters", {}).get("model_name_or_path"),
            self.peft.get("base_model_name_or_path"),
        )
        known = [name for name in names if isinstance(name, str) and name]
        there = [name for name in known if Path(name).expanduser().is_dir()]
        # A folder of the machine that trained it may be gone, where a name is good everywhere.
        others = [name for name in known if not Path(name).is_absolute()]
        return next(iter([*there, *others, *known]), None)


def read_stored_adapter(path: str | Path) -> StoredAdapter:
    """Read a Lightning checkpoint (a file or a sharded folder) or a folder in PEFT format.

    Raises:
        CheckpointError: It is missing, damaged, or no adapter.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not is_directory(path):
        values, tensors = read_peft_files(path)
        state = from_peft_tensors(tensors)
        return StoredAdapter(path, from_peft_config(values, state, str(path)), state, {}, values)
    checkpoint = read_checkpoint(path)
    config = LoRAConfig.from_dict(checkpoint[METADATA_KEY]["config"])
    return StoredAdapter(path, config, checkpoint["state_dict"], checkpoint, {})


def base_folder(adapter: StoredAdapter, base: str | Path | None = None) -> Path:
    """The folder of an adapter's base, downloaded where it is a name on the hub.

    Args:
        adapter: The adapter.
        base: A folder or name in the place of the one that the adapter names.

    Raises:
        CheckpointError: No base is named, or it is not to be had.
    """
    name = str(base) if base is not None else adapter.base_name
    if name is None:
        raise CheckpointError(f"{adapter.path} does not name its base. Give --base FOLDER.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"The base {folder} holds no config.json, so it is no Hugging Face model."
            )
        return folder
    if folder.is_absolute() or name.startswith("."):
        raise CheckpointError(f"There is no folder {folder} of the base model. Give --base FOLDER.")
    try:
        return model_folder(name)
    except Exception as error:  # the hub's client raises many kinds
        reason = first_line(error, most=None)
        raise CheckpointError(
            f"The base model {name} is not on this machine and could not be downloaded ({reason}). "
            "Give --base FOLDER."
        ) from error
