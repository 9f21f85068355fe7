"""Adapters and merged models to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_lora.errors import CheckpointError, ConfigError, first_line

_KINDS = {"adapter_config.json": "an adapter in PEFT format", "config.json": "a model"}


def kind_of_folder(folder: Path) -> str:
    """What a folder holds that the hub knows.

    Raises:
        CheckpointError: Neither an adapter in PEFT format nor a model, with what to do.
    """
    if not folder.exists():
        raise CheckpointError(f"There is no folder {folder}.")
    if folder.is_dir():
        for file, kind in _KINDS.items():
            if (folder / file).is_file() and any(folder.glob("*.safetensors")):
                return kind
    raise CheckpointError(
        f"{folder} holds neither an adapter in PEFT format nor a model. Make one of a checkpoint "
        "first: lightning-lora export CKPT DIR, or lightning-lora merge CKPT --output DIR."
    )


def files_of(folder: Path) -> dict[str, int]:
    """The files that are uploaded, and their bytes; hidden ones stay."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder): path.stat().st_size for path in found}
    return {
        name.as_posix(): size
        for name, size in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def require_login() -> str:
    """Name of the user that `huggingface_hub` is logged in as.

    Raises:
        ConfigError: Nobody is, the token is not valid, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.get_token() is None:
        raise ConfigError("Not logged in to the hub. Run `hf auth login`, or set HF_TOKEN.")
    try:
        return str(huggingface_hub.HfApi().whoami()["name"])
    except HfHubHTTPError as error:
        raise ConfigError(
            f"The hub does not accept the token ({first_line(error)}). Run `hf auth login` again."
        ) from error
    except Exception as error:  # the client raises many kinds
        raise ConfigError(_unreachable(error)) from error


def push_folder(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder in one commit, making the repository where there is none.

    Args:
        folder: An adapter in PEFT format or a model.
        name: ``user/name``, or ``name`` of the user's own.
        private: Whether a new repository is private; one that is there stays as it is.

    Returns:
        The address.

    Raises:
        CheckpointError: The folder holds nothing to upload.
        ConfigError: Not logged in, the name is not allowed, or the upload failed.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    kind_of_folder(folder)
    user = require_login()
    full = name if "/" in name else f"{user}/{name}"
    api: Any = huggingface_hub.HfApi()
    try:
        api.create_repo(full, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=full,
            folder_path=folder,
            allow_patterns=list(files_of(folder)),
            commit_message="Upload with lightning-lora",
        )
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no name for the hub: {first_line(error)}") from error
    except Exception as error:  # the client raises many kinds
        raise ConfigError(f"{folder} was not uploaded to {full}: {first_line(error)}") from error
    return f"https://huggingface.co/{full}"


def _unreachable(error: Exception) -> str:
    return f"The hub cannot be reached ({first_line(error)}). Check the network and HF_HUB_OFFLINE."
