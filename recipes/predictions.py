"""Predictions of all ranks, brought together by row and written so that no half a file appears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
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


def gather_arrays(
    own: Iterable[Mapping[str, np.ndarray]], key: str, world_size: int
) -> dict[str, np.ndarray]:
    """Return the arrays of all batches and ranks, each row once and in order; a collective call.

    A distributed sampler repeats rows to even out the ranks; their numbers undo that.

    Args:
        own: This rank's batches, all with the same names, each array `[rows, ...]`.
        key: Name of the array with the rows' numbers, int64 `[rows]`.
        world_size: How many ranks there are.

    Returns:
        One array of each name; nothing where there are no rows at all.

    Example:
        >>> first = {"row": np.array([1, 0]), "x": np.array([5, 4])}
        >>> gather_arrays([first, {"row": np.array([1]), "x": np.array([5])}], "row", 1)["x"]
        array([4, 5])
    """
    parts = list(own)
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, parts)
        parts = [part for rank in gathered for part in rank]
    if not parts:
        return {}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, once = np.unique(joined[key], return_index=True)
    return {name: values[once] for name, values in joined.items()}


@contextmanager
def replacing_file(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes its place only when the block ends well; its folder is made."""
    with replacing_path(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as stream:
        yield stream
