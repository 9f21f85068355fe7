"""Predictions of all ranks, brought together by row and written so that no half a file appears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_lora.errors import ConfigError
from lightning_lora.files import replacing_file as replacing_path


class PredictionFileWriter(BasePredictionWriter):
    """Writes predictions to a file when prediction ends; subclasses implement `write`.

    Args:
        path: The file; it is replaced as a whole once all rows are predicted.

    Raises:
        ConfigError: If the suffix is none of the class's.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = check_suffix(path, self.suffixes)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write what was predicted."""
        self.write(trainer, pl_module, predictions)

    def write(self, trainer: Trainer, module: Any, predictions: Sequence[Any]) -> None:
        """Bring the ranks' predictions together and write them on the first.

        Args:
            trainer: The trainer that has predicted; all ranks call this.
            module: The LightningModule.
            predictions: What `predict_step` has returned on this rank, batch by batch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it writes.")


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
