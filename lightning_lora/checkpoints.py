"""Reading checkpoint files: what can be wrong with one, said in one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import CheckpointError
from lightning_lora.state import METADATA_KEY


@contextmanager
def explain_unreadable(path: Any) -> Iterator[None]:
    """Turn the many errors of reading a checkpoint into `CheckpointError`s that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        folder = Path(str(path)).parent
        found = sorted(p.name for p in folder.glob("*.ckpt")) if folder.is_dir() else []
        where = (
            f"{folder} holds: {', '.join(found[:5])}"
            if found
            else f"there are no .ckpt files in {folder}"
        )
        raise CheckpointError(f"Checkpoint not found: {path} ({where}).") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} could not be read: it is damaged, or holds more than tensors and primitives, "
            f"which are not loaded from untrusted files ({_first_line(error)})."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise CheckpointError(
            f"{path} could not be read: it is truncated, or not a checkpoint "
            f"({_first_line(error)}). Use an earlier checkpoint."
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read an adapter checkpoint onto the CPU; nothing in it is executed.

    Raises:
        CheckpointError: The file is missing, damaged, or no adapter checkpoint.
    """
    with explain_unreadable(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    require_metadata(checkpoint, str(path))
    return dict(checkpoint)


def require_metadata(checkpoint: Any, source: str) -> Mapping[str, Any]:
    """The section that every adapter checkpoint has.

    Raises:
        CheckpointError: The file is a checkpoint of another kind.
    """
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{source} is not a Lightning checkpoint: it has no 'state_dict'.")
    metadata = checkpoint.get(METADATA_KEY)
    if metadata is None:
        count = len(checkpoint["state_dict"])
        raise CheckpointError(
            f"{source} is a full-model checkpoint ({count} tensors, no {METADATA_KEY!r} section), "
            "not an adapter. Load it into the model before LoRA is injected (for instance in the "
            "LightningModule's __init__), and give ckpt_path a checkpoint that LoRACallback "
            "wrote."
        )
    section: Mapping[str, Any] = metadata
    return section


def require_training_state(checkpoint: Mapping[str, Any], source: str) -> None:
    """A fit goes on only from a checkpoint with the optimizers' state.

    Raises:
        CheckpointError: The checkpoint was saved with ``weights_only=True``.
    """
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{source} holds the adapter without optimizer state (it was saved with "
            "weights_only=True), so a fit cannot resume from it. Start the fit without ckpt_path "
            "after load_adapter(model, path), or resume from a full checkpoint."
        )


def load_optimizer_state(load: Callable[[Any], None], checkpoint: Any) -> None:
    """Load the optimizers' state, with a reason where it does not fit.

    Raises:
        CheckpointError: The optimizer has other parameter groups than the one that was saved.
    """
    try:
        load(checkpoint)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint's optimizer state does not fit the optimizer ({_first_line(error)}). "
            "Resume with the optimizer and the parameter groups that it was saved with, or start "
            "a new fit after load_adapter(model, path)."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
