"""Predictions of all ranks, brought together by row and written so that no half a file appears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Trainer

from lightning_lora.errors import ConfigError
from lightning_lora.files import replacing_file as replacing_path


def check_suffix(path: str | Path, suffixes: Sequence[str]) -> Path:
    """Return the path of a file of predictions.

    Args:
        path: The file.
        suffixes: Those that can be written.

    Raises:
        ConfigError: If the suffix is another.
    """
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise ConfigError(
            f"Predictions cannot be written to {path}: give a file that ends in "
            f"{' or '.join(suffixes)}."
        )
    return file


def gather_rows(trainer: Trainer, own: Mapping[int, Any]) -> dict[int, Any]:
    """Return what all ranks have by row number; a collective call in a distributed run.

    A distributed sampler repeats rows to even out the ranks; the row numbers undo that.

    Args:
        trainer: The trainer that runs.
        own: This rank's values by the number of the row.
    """
    if trainer.world_size == 1:
        return dict(own)
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, dict(own))
    return {row: values for part in gathered for row, values in part.items()}


@contextmanager
def replacing_file(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes its place only when the block ends well; its folder is made."""
    with replacing_path(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as stream:
        yield stream
