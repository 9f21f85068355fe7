"""Predicted classes or values into a file: every row once and in order, from all ranks."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.recipes.classification.problems import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from lightning_lora.recipes.predictions import PredictionFileWriter, gather_rows, replacing_file

SUFFIXES = (".csv", ".jsonl", ".tsv")
_LIKELY = 0.5


class ClassPredictionWriter(PredictionFileWriter):
    """Writes texts, predicted labels and the probability of each class when prediction ends.

    Args:
        path: A `.csv` or `.jsonl` file, or a `.tsv` file in the format of GLUE's server (`index`
            and `prediction`); it is replaced as a whole once all rows are predicted.

    Raises:
        ConfigError: If the suffix is another.
    """

    suffixes = SUFFIXES

    def write(self, trainer: Trainer, module: Any, predictions: Sequence[Any]) -> None:
        """Bring the ranks' predictions together and write them on the first."""
        problem = getattr(module, "problem_type", SINGLE_LABEL)
        name = "values" if problem == REGRESSION else "probabilities"
        own = {
            row: values
            for batch in predictions
            for row, values in zip(batch["row"].tolist(), batch[name].tolist(), strict=True)
        }
        predicted = gather_rows(trainer, own)
        if trainer.is_global_zero:
            columns: dict[str, Sequence[Any]] = {}
            datamodule: Any = getattr(trainer, "datamodule", None)
            if hasattr(datamodule, "prediction_columns"):
                columns = datamodule.prediction_columns()
            class_names = getattr(module, "class_names", None) or []
            write_predictions(self.path, columns, predicted, class_names, problem)


def write_predictions(
    path: Path,
    columns: Mapping[str, Sequence[Any]],
    predicted: Mapping[int, Any],
    class_names: Sequence[str],
    problem: str = SINGLE_LABEL,
) -> None:
    """Write predictions to a file that appears only when it is complete.

    Args:
        path: A CSV, JSON lines, or (for GLUE's server) TSV file; its folder is made.
        columns: Columns of the data to repeat beside the predictions.
        predicted: For each row's number the probability of each class, or the predicted value.
        class_names: The classes in the order of the probabilities.
        problem: The problem type.
    """
    suffix = path.suffix.lower()
    with replacing_file(path) as stream:
        writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
        if suffix == ".csv":
            likely = f"predicted_{_noun(problem)}"
            writer.writerow([*columns, likely, *(f"probability_{name}" for name in class_names)])
        elif suffix == ".tsv":
            writer.writerow(["index", "prediction"])
        for row in sorted(predicted):
            values, answer = predicted[row], _answer(predicted[row], class_names, problem)
            texts = {name: column[row] for name, column in columns.items()}
            shares = [] if problem == REGRESSION else values
            if suffix == ".tsv":
                writer.writerow([row, _in_one_field(answer)])
            elif suffix == ".csv":
                fields = [f"{value:.6f}" for value in shares]
                writer.writerow([*texts.values(), _in_one_field(answer), *fields])
            else:
                record = {**texts, f"predicted_{_noun(problem)}": answer}
                if problem != REGRESSION:
                    rounded = (round(value, 6) for value in shares)
                    record["probabilities"] = dict(zip(class_names, rounded, strict=True))
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _noun(problem: str) -> str:
    return {REGRESSION: "value", MULTI_LABEL: "labels"}.get(problem, "label")


def _answer(values: Any, class_names: Sequence[str], problem: str) -> Any:
    if problem == REGRESSION:
        return round(values, 6)
    if problem == MULTI_LABEL:
        pairs = zip(class_names, values, strict=True)
        return [name for name, value in pairs if value >= _LIKELY]
    return class_names[max(range(len(values)), key=values.__getitem__)]


def _in_one_field(answer: Any) -> Any:
    return "|".join(answer) if isinstance(answer, list) else answer
