"""Class names: read from training data, kept in checkpoints; labels turned into numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import CheckpointError, DataError
from lightning_lora.recipes.classification.label_sets import encode_label_sets, read_set_names
from lightning_lora.recipes.classification.problems import MULTI_LABEL, REGRESSION
from lightning_lora.recipes.files import Table, is_empty, nearest

_MOST_CLASSES = 1000


def label_text(value: Any) -> str:
    """Write a label as its class name: `1` as `"1"`, text without the blanks around it."""
    return str(value).strip()


def read_class_names(table: Table, label_column: str) -> list[str]:
    """Return the class names that the source declares, else the sorted names that occur.

    Names that are whole numbers are sorted as numbers.

    Args:
        table: The training data.
        label_column: The column that holds the labels.

    Raises:
        DataError: If a label is missing, or there are fewer than two or far too many classes.

    Example:
        >>> read_class_names(Table("t.csv", {"label": ["10", "9", "9"]}), "label")
        ['9', '10']
    """
    values = table.column(label_column, "data.label_column")
    if table.class_names is not None:
        return table.class_names
    for row, value in enumerate(values):
        if is_empty(value):
            raise DataError(f"{table.where(row)}: the column {label_column!r} is empty.")
    names = {label_text(value) for value in values}
    if len(names) < 2:
        raise DataError(
            f"{table.source}: the column {label_column!r} holds one class only ({names.pop()!r}); "
            "a classifier needs two. Check data.label_column."
        )
    if len(names) > _MOST_CLASSES:
        raise DataError(
            f"{table.source}: the column {label_column!r} holds {len(names)} different values in "
            f"{len(table)} rows, which are no classes. Check data.label_column."
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def encode_labels(table: Table, label_column: str, class_names: Sequence[str]) -> list[int]:
    """Turn a label column into class numbers.

    Args:
        table: The data.
        label_column: The column that holds the labels.
        class_names: The known classes in the order of the model's outputs.

    Raises:
        DataError: If a label is missing or unknown.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    encoded = []
    for row, value in enumerate(table.column(label_column, "data.label_column")):
        if is_empty(value):
            raise DataError(f"{table.where(row)}: the column {label_column!r} is empty.")
        name = label_text(value)
        if name not in numbers:
            raise DataError(
                f"{table.where(row)}: unknown label {name!r}{nearest(name, class_names)}. The "
                f"classes of the training data are: {', '.join(class_names)}."
            )
        encoded.append(numbers[name])
    return encoded


def encode_numbers(table: Table, label_column: str) -> list[float]:
    """Turn a label column of a regression into numbers.

    Args:
        table: The data.
        label_column: The column that holds the values.

    Raises:
        DataError: If a value is missing or no finite number.
    """
    encoded = []
    for row, value in enumerate(table.column(label_column, "data.label_column")):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{table.where(row)}: the column {label_column!r} holds {value!r} where a "
                "regression needs a number. Correct the row, name another data.label_column, or "
                "set data.problem_type."
            )
        encoded.append(number)
    return encoded


def label_names(
    problem: str, table: Table, label_column: str | list[str], separator: str
) -> list[str]:
    """Return the class names of a problem; a regression has none.

    Raises:
        DataError: If the labels are not what the problem needs.
    """
    if problem == REGRESSION:
        return []
    if problem == MULTI_LABEL:
        return read_set_names(table, label_column, separator)
    assert isinstance(label_column, str)
    return read_class_names(table, label_column)


def encode_targets(
    problem: str,
    table: Table,
    label_column: str | list[str],
    class_names: Sequence[str],
    separator: str,
) -> list[Any]:
    """Return what the loss compares with, row by row: a number, or one for each class.

    Raises:
        DataError: If a label is missing, unknown or not of the problem's kind.
    """
    if problem == MULTI_LABEL:
        return encode_label_sets(table, label_column, class_names, separator)
    assert isinstance(label_column, str)
    if problem == REGRESSION:
        return encode_numbers(table, label_column)
    return encode_labels(table, label_column, class_names)


def class_names_in_checkpoint(path: str | Path) -> list[str] | None:
    """Read the class names that a checkpoint was trained with.

    Args:
        path: A Lightning checkpoint.

    Returns:
        The names, or None where the checkpoint holds none.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise CheckpointError(f"{path} is no checkpoint that can be read: {error}") from error
    return checkpoint.get("hyper_parameters", {}).get("class_names")
