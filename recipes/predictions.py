"""Predictions into a file: every row once and in order, whatever the number of ranks."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_lora.errors import ConfigError

SUFFIXES = (".csv", ".jsonl")


class ClassPredictionWriter(BasePredictionWriter):
    """Writes texts, predicted labels and the probability of each class when prediction ends.

    Args:
        path: A `.csv` or `.jsonl` file; it is replaced as a whole once all rows are predicted.

    Raises:
        ConfigError: If the suffix is another.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"Predictions cannot be written to {path}: give a file that ends in "
                f"{' or '.join(SUFFIXES)}."
            )

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Bring the ranks' predictions together and write them on the first."""
        probabilities = _gather(trainer, predictions)
        if trainer.is_global_zero:
            columns: dict[str, Sequence[Any]] = {}
            datamodule: Any = getattr(trainer, "datamodule", None)
            if hasattr(datamodule, "prediction_columns"):
                columns = datamodule.prediction_columns()
            class_names = getattr(pl_module, "class_names", None) or []
            write_predictions(self.path, columns, probabilities, class_names)


def write_predictions(
    path: Path,
    columns: dict[str, Sequence[Any]],
    probabilities: dict[int, list[float]],
    class_names: Sequence[str],
) -> None:
    """Write predictions to a CSV or JSON lines file that appears only when it is complete.

    Args:
        path: The file; its folder is made.
        columns: Columns of the data to repeat beside the predictions.
        probabilities: For each row's number the probability of each class.
        class_names: The classes in the order of the probabilities.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix.lower() == ".csv":
            writer = csv.writer(stream)
            header = [*columns, "predicted_label"]
            writer.writerow(header + [f"probability_{name}" for name in class_names])
        for row in sorted(probabilities):
            values = probabilities[row]
            label = class_names[max(range(len(values)), key=values.__getitem__)]
            texts = {name: column[row] for name, column in columns.items()}
            if path.suffix.lower() == ".csv":
                writer.writerow([*texts.values(), label, *(f"{value:.6f}" for value in values)])
            else:
                shares = dict(zip(class_names, (round(value, 6) for value in values), strict=True))
                record = {**texts, "predicted_label": label, "probabilities": shares}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def _gather(trainer: Trainer, predictions: Sequence[Any]) -> dict[int, list[float]]:
    own = {
        row: values
        for batch in predictions
        for row, values in zip(batch["row"].tolist(), batch["probabilities"].tolist(), strict=True)
    }
    if trainer.world_size == 1:
        return own
    # A distributed sampler repeats rows to even out the ranks; the row numbers undo that.
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, own)
    return {row: values for part in gathered for row, values in part.items()}
