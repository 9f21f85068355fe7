"""An adapter checkpoint to a folder in PEFT's format, without the base's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lightning_lora.errors import CheckpointError
from lightning_lora.interop import refuse_non_finite, write_adapter
from lightning_lora.model_card import facts_of_run
from lightning_lora.peft_format import to_peft_config, to_peft_tensors
from lightning_lora.skeleton import Skeleton, build_skeleton
from lightning_lora.stored import StoredAdapter, base_folder, read_stored_adapter
from lightning_lora.tokenizer_files import tokenizer_files


@dataclass(frozen=True)
class Export:
    """An export that was prepared: PEFT can express the adapter, and nothing is written.

    Attributes:
        adapter: The adapter.
        skeleton: The model without weights.
        folder: The folder of the base, for its tokenizer, where it is on this machine.
    """

    adapter: StoredAdapter
    skeleton: Skeleton
    folder: Path | None


def prepare_export(checkpoint: str | Path, base: str | Path | None = None) -> Export:
    """Read a checkpoint, and find out whether PEFT can express it.

    Args:
        checkpoint: A Lightning checkpoint of `LoRACallback`, a file or a sharded folder.
        base: Folder or hub name of the base; it is needed only for a checkpoint that does not
            describe its model, and to bring the tokenizer along.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, is in PEFT's format already, or holds
            what PEFT cannot express, or NaN, with the reason.
    """
    adapter = read_stored_adapter(checkpoint)
    if adapter.peft:
        raise CheckpointError(f"{checkpoint} is in PEFT format already.")
    refuse_non_finite(adapter.state)
    folder = None
    if base is not None or (adapter.record is None and "model" not in adapter.base):
        folder = base_folder(adapter, base)
    skeleton = build_skeleton(adapter, folder)
    # The same that writing does, for what it may refuse.
    to_peft_tensors(skeleton.root, skeleton.prefix, adapter.state)
    to_peft_config(skeleton.root, skeleton.prefix)
    if folder is None and adapter.base_name and Path(adapter.base_name).expanduser().is_dir():
        folder = Path(adapter.base_name).expanduser()
    return Export(adapter, skeleton, folder)


def write_export(export: Export, directory: str | Path) -> list[Path]:
    """Write a prepared export: the adapter, its model card, and the tokenizer where it is known.

    Args:
        export: From `prepare_export`.
        directory: The folder; replaced as a whole, but for a README.md, which stays.

    Returns:
        The files.

    Raises:
        CheckpointError: The folder cannot be written; nothing is left.
    """
    adapter, skeleton = export.adapter, export.skeleton
    training, data, scores = facts_of_run(adapter.checkpoint, adapter.path)
    position = {
        k: adapter.checkpoint[k] for k in ("epoch", "global_step") if k in adapter.checkpoint
    }
    try:
        with tokenizer_files(export.folder, adapter.metadata) as files:
            write_adapter(
                skeleton.root,
                directory,
                skeleton.part,
                adapter.state,
                files,
                training=training,
                data=data,
                scores=scores,
                position=position,
            )
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{directory} cannot be written: {reason}.") from error
    return sorted(path for path in Path(directory).iterdir() if path.is_file())
