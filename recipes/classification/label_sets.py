"""Labels of problems where a row may belong to several classes, or to none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.files import Table, is_empty, nearest

_YES_AND_NO = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}


def label_set(value: Any, separator: str) -> list[str]:
    """Return the labels in one cell: a list, a JSON list, or text with a separator.

    >>> label_set("joy| fear ", "|"), label_set('["joy"]', "|"), label_set("", "|")
    (['joy', 'fear'], ['joy'], [])
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value.strip()]
    if isinstance(value, (list, tuple)):
        return [str(label).strip() for label in value]
    if is_empty(value):
        return []
    return [label.strip() for label in str(value).split(separator) if label.strip()]


def read_set_names(table: Table, label_column: str | list[str], separator: str) -> list[str]:
    """Return the class names: the columns' where each class has one, else the sorted labels.

    Args:
        table: The training data.
        label_column: The column that holds the labels of each row, or a column for each class
            that holds 0 or 1.
        separator: Stands between the labels of a row in text.

    Raises:
        DataError: If there is no label at all.
    """
    if isinstance(label_column, list):
        return label_column
    if table.class_names is not None:
        return table.class_names
    values = table.column(label_column, "data.label_column")
    names = {label for value in values for label in label_set(value, separator)}
    if not names:
        raise DataError(
            f"{table.source}: the column {label_column!r} holds no label. Check data.label_column."
        )
    return sorted(names)


def encode_label_sets(
    table: Table, label_column: str | list[str], class_names: Sequence[str], separator: str
) -> list[list[float]]:
    """Turn the labels of each row into a 0 or 1 for each class.

    Args:
        table: The data.
        label_column: As in `read_set_names`.
        class_names: The classes in the order of the model's outputs.
        separator: As in `read_set_names`.

    Raises:
        DataError: If a label is unknown, or a class's column holds anything but 0 and 1.
    """
    if isinstance(label_column, list):
        columns = [_yes_and_no(table, name) for name in class_names]
        return [list(row) for row in zip(*columns, strict=True)]
    places = {name: place for place, name in enumerate(class_names)}
    encoded = []
    for row, value in enumerate(table.column(label_column, "data.label_column")):
        flags = [0.0] * len(places)
        for label in label_set(value, separator):
            if label not in places:
                raise DataError(
                    f"{table.where(row)}: unknown label {label!r}{nearest(label, class_names)}. "
                    f"The classes of the training data are: {', '.join(class_names)}. (Labels are "
                    f"split at {separator!r}: data.label_separator.)"
                )
            flags[places[label]] = 1.0
        encoded.append(flags)
    return encoded


def _yes_and_no(table: Table, name: str) -> list[float]:
    flags = []
    for row, value in enumerate(table.column(name, "data.label_column")):
        flag = _YES_AND_NO.get(str(value).strip().lower())
        if flag is None:
            raise DataError(
                f"{table.where(row)}: the column {name!r} holds {value!r} where 0 or 1 must stand."
            )
        flags.append(flag)
    return flags
