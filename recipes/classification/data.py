"""Data for text classification: labelled rows in, tokenized batches of like length out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_lora.errors import DataError
from lightning_lora.recipes.cache import cached_rows, tokenizer_fingerprint
from lightning_lora.recipes.classification.labels import encode_targets, label_names
from lightning_lora.recipes.classification.problems import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    check_problem,
)
from lightning_lora.recipes.data import RecipeDataModule
from lightning_lora.recipes.files import Table, is_empty

_CHUNK = 1000


class ClassificationDataModule(RecipeDataModule):
    """Texts, or pairs of texts, with one label each, several, or a number.

    The rows come from files of one's own or from a dataset on the Hugging Face hub. The class
    names are those of the training data; a model that has class names goes before, so that
    evaluation and prediction need no training data. The tokenizer is the model's.

    Args:
        text_column: Column of the text, or two columns for pairs.
        label_column: Column of the label; for several labels a row also a column of 0 and 1 for
            each class.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`.
        label_separator: Stands between the labels of a row where there are several in a text.
        metrics: What the model reports unless it has metrics of its own.
        **kwargs: As for `RecipeDataModule`. Files are CSV, TSV, JSON lines or Parquet;
            `predict_file` needs no labels; longer inputs than `max_length` are cut off.

    Raises:
        ConfigError: If settings contradict each other.

    Example:
        >>> data = ClassificationDataModule(train_file="bundled:quickstart/data/train.csv")
        >>> data.batch_size
        32
    """

    extra_validation: Sequence[str] = ()

    def __init__(
        self,
        text_column: str | list[str] = "text",
        label_column: str | list[str] = "label",
        problem_type: str = SINGLE_LABEL,
        label_separator: str = "|",
        metrics: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.label_column = label_column
        self.problem_type = check_problem(problem_type, "data.problem_type")
        self.label_separator = label_separator
        self.metrics = metrics
        self.class_names: list[str] | None = None
        self.require_good_settings()

    def check_settings(self) -> list[str]:
        """Return what is wrong with the settings."""
        problems = super().check_settings()
        if len(self.text_columns) not in (1, 2):
            problems.append("text_column takes one column or two")
        if isinstance(self.label_column, list) and self.problem_type != MULTI_LABEL:
            problems.append(f"several label columns need problem_type {MULTI_LABEL}")
        if not self.label_separator:
            problems.append("label_separator is empty")
        return problems

    def check_table(self, table: Table) -> None:
        """Refuse rows without a text.

        Raises:
            DataError: Where one is.
        """
        for name in self.text_columns:
            for row, value in enumerate(table.column(name, "data.text_column")):
                if is_empty(value):
                    raise DataError(
                        f"{table.where(row)}: the column {name!r} is empty. Remove the row or "
                        "fill it in."
                    )

    def setup(self, stage: str) -> None:
        """Read the rows that the stage needs, and find the class names.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            DataError: If data for the stage are missing or not what the settings say.
        """
        self.class_names = getattr(self.module, "class_names", None)
        super().setup(stage)
        if stage != "predict" and self.class_names is None and self.problem_type != REGRESSION:
            assert self.label_column is not None
            self.class_names = label_names(
                self.problem_type, self.table("train"), self.label_column, self.label_separator
            )

    def val_dataloader(self) -> Any:
        """Return batches of the validation rows, and of further validation sets where there are."""
        extra = [self.loader(name) for name in self.extra_validation]
        return [self.loader("validation"), *extra] if extra else self.loader("validation")

    def extra_split(self, name: str) -> Table:
        """Read one of the further validation sets; data modules that have some implement it."""
        raise DataError(f"There is no validation set {name}.")

    def table(self, split: str) -> Table:
        """Return the rows of a split or of a further validation set."""
        if split in self.extra_validation and split not in self._tables:
            self._tables[split] = self.extra_split(split)
            self.check_table(self._tables[split])
        return super().table(split)

    def encode(self, split: str) -> Any:
        """Return tokenized rows: the row's number, the model's inputs, the label, and the length.

        Args:
            split: One of the splits, or a further validation set.

        Raises:
            DataError: If a label is missing or wrong.
        """
        table, labelled = self.table(split), split != "predict"
        if labelled and self.class_names is None and self.problem_type != REGRESSION:
            raise DataError("The class names are not known before `setup` has run.")
        limit = min(self.max_length, self.tokenizer.model_max_length)
        parts = [
            "classification",
            tokenizer_fingerprint(self.tokenizer),
            table.fingerprint,
            self.text_columns,
            limit,
            [self.label_column, self.problem_type, self.class_names] if labelled else None,
            self.label_separator,
        ]
        return cached_rows(parts, lambda: self._rows(table, labelled, limit), self.cache_dir)

    def collator(self, split: str) -> PaddingCollator:
        """Return what pads a batch to its longest row."""
        return PaddingCollator(self.tokenizer)

    def prediction_columns(self) -> dict[str, Sequence[Any]]:
        """Return the text columns of the rows to predict, for writing beside the predictions."""
        table = self.table("predict")
        return {name: table.columns[name] for name in self.text_columns}

    def _rows(self, table: Table, labelled: bool, limit: int) -> Iterator[dict[str, Any]]:
        targets: Sequence[Any] = ()
        if labelled:
            assert self.label_column is not None
            names = self.class_names or []
            targets = encode_targets(
                self.problem_type, table, self.label_column, names, self.label_separator
            )
        columns = [table.columns[name] for name in self.text_columns]
        for start in range(0, len(table), _CHUNK):
            texts = [[str(text) for text in column[start : start + _CHUNK]] for column in columns]
            encoded = self.tokenizer(
                *texts, truncation=True, max_length=limit, return_attention_mask=False
            )
            for place, tokens in enumerate(encoded["input_ids"]):
                row = {name: encoded[name][place] for name in encoded}
                row |= {"row": start + place, "length": len(tokens)}
                if labelled:
                    row["label"] = targets[start + place]
                yield row


class PaddingCollator:
    """Pads tokenized rows to the longest of the batch.

    Args:
        tokenizer: Knows what to pad with, and on which side.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `row`, the model's inputs `[rows, tokens]` and, for labelled rows, `labels`."""
        names = [name for name in rows[0] if name not in ("row", "length", "label")]
        # Said once for every fast tokenizer: that calling it would be faster than padding alone.
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        batch = dict(
            self.tokenizer.pad(
                [{name: row[name] for name in names} for row in rows], return_tensors="pt"
            )
        )
        batch["row"] = torch.tensor([row["row"] for row in rows])
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch
