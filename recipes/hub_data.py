"""Tables from datasets on the Hugging Face hub, or from folders laid out like one."""

from __future__ import annotations

from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.files import Table, nearest


def load_hub_dataset(name: str, config: str | None = None) -> Any:
    """Load a dataset with all its splits; what was downloaded before is taken from the cache.

    Args:
        name: Its name on the hub, or a local folder.
        config: The configuration, for datasets that have several.

    Raises:
        DataError: If it cannot be found or loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the library raises errors of many kinds, its own and others'
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"The dataset {name} ({config or 'default configuration'}) cannot be loaded: {reason} "
            "Check data.dataset, data.dataset_config and the network, or give files."
        ) from error


def hub_table(
    loaded: Any, source: str, role: str, split: str, label_column: str | list[str] | None = None
) -> Table:
    """Take one split of a loaded dataset as a table, with class numbers turned into names.

    Args:
        loaded: The dataset with its splits.
        source: The dataset's name.
        role: What the split is used for: `train`, `validation`, `test` or `predict`.
        split: The split's name.
        label_column: The column of labels; its class names are used where it declares them. A
            column of lists of labels gives lists of names.

    Raises:
        DataError: If there is no such split.
    """
    if split not in loaded:
        raise DataError(
            f"The dataset {source} has no split {split!r}{nearest(split, loaded)}. It has: "
            f"{', '.join(loaded)}. Name the right one in data.dataset_splits, under {role}."
        )
    rows = loaded[split]
    columns: dict[str, Any] = {column: rows[column] for column in rows.column_names}
    label_type = rows.features.get(label_column) if isinstance(label_column, str) else None
    names = getattr(getattr(label_type, "feature", label_type), "names", None)
    if names is not None and isinstance(label_column, str):
        columns[label_column] = [_names(names, value) for value in columns[label_column]]
    title = f"{source} [{split}]"
    return Table(title, columns, class_names=names, fingerprint=rows._fingerprint)


def _names(names: list[str], value: Any) -> Any:
    if isinstance(value, list):
        return [names[number] for number in value]
    # GLUE marks the withheld labels of its test sets with -1.
    return None if value is None or value < 0 else names[value]
