"""Data for text classification: labelled rows in, tokenized and padded batches out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.batching import TextRows, TokenizingCollator
from lightning_lora.recipes.files import Table, is_empty, nearest, read_table
from lightning_lora.recipes.hub_data import hub_table, load_hub_dataset
from lightning_lora.recipes.labels import encode_labels, read_class_names

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


class ClassificationDataModule(LightningDataModule):
    """Texts, or pairs of texts, with one label each.

    The rows come from files of one's own or from a dataset on the Hugging Face hub. The class
    names are those of the training data; a model that has class names goes before, so that
    evaluation and prediction need no training data. The tokenizer is the model's.

    Args:
        train_file: CSV, TSV, JSON lines or Parquet file to train on. `bundled:` paths point into
            the installed package.
        validation_file: File to validate on. Without it a share of the training rows is held out.
        test_file: File to test on.
        predict_file: File to predict; needs no labels.
        dataset: Dataset on the Hugging Face hub, instead of files.
        dataset_config: Configuration of that dataset, such as `sst2` of `nyu-mll/glue`.
        dataset_splits: Split for each of `train`, `validation`, `test` and `predict` where its
            name differs.
        text_column: Column of the text, or two columns for pairs.
        label_column: Column of the label.
        validation_share: Share of the training rows to validate on without a validation file.
        split_seed: Seed of that division, which is the same in every run.
        quoting: Whether `"` quotes fields in CSV and TSV files; by default in CSV files only.
        max_length: Longest input in tokens; the rest is cut off.
        batch_size: Rows in a training batch.
        eval_batch_size: Rows in a batch elsewhere; by default the training batch's.
        num_workers: Processes that prepare batches.
        shuffle: Whether each epoch takes the training rows in a new order.
        tokenizer: Tokenizer for models other than the recipe's: its hub name or folder.

    Raises:
        ConfigError: If settings contradict each other.

    Example:
        >>> data = ClassificationDataModule(train_file="bundled:quickstart/data/train.csv")
        >>> data.batch_size
        32
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_splits: dict[str, str] | None = None,
        text_column: str | list[str] = "text",
        label_column: str = "label",
        validation_share: float = 0.1,
        split_seed: int = 0,
        quoting: bool | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.files = {
            "train": train_file,
            "validation": validation_file,
            "test": test_file,
            "predict": predict_file,
        }
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.dataset_splits = dict(dataset_splits or {})
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.label_column = label_column
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.quoting = quoting
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.class_names: list[str] | None = None
        self._tokenizer_name = tokenizer
        self._tokenizer: Any = None
        self._tables: dict[str, Table] = {}
        self._check_settings()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one named in the settings, else the model's.

        Raises:
            ConfigError: If there is neither.
        """
        if self._tokenizer is None:
            if self._tokenizer_name is not None:
                from lightning_lora.recipes.pretrained import load_tokenizer

                self._tokenizer = load_tokenizer(self._tokenizer_name)
            else:
                self._tokenizer = getattr(self._module(), "tokenizer", None)
        if self._tokenizer is None:
            raise ConfigError(
                "The data need a tokenizer: set data.tokenizer, or use a model with an attribute "
                "`tokenizer`."
            )
        return self._tokenizer

    def prepare_data(self) -> None:
        """Download the dataset, on one process only."""
        if self.dataset is not None:
            load_hub_dataset(self.dataset, self.dataset_config)

    def setup(self, stage: str) -> None:
        """Read the rows that the stage needs, and find the class names.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            DataError: If data for the stage are missing or not what the settings say.
        """
        self.class_names = getattr(self._module(), "class_names", None)
        if stage == "predict":
            self._table("predict")
            return
        for split in _STAGES[stage]:
            self._table(split)
        if self.class_names is None:
            self.class_names = read_class_names(self._table("train"), self.label_column)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of the training rows."""
        return self._loader("train", self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        """Return batches of the validation rows."""
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return batches of the test rows."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """Return batches of the rows to predict, without labels."""
        return self._loader("predict", self.eval_batch_size)

    def prediction_columns(self) -> dict[str, Sequence[Any]]:
        """Return the text columns of the rows to predict, for writing beside the predictions."""
        table = self._table("predict")
        return {name: table.columns[name] for name in self.text_columns}

    def provides(self, split: str) -> bool:
        """Say whether the settings name data for `train`, `validation`, `test` or `predict`."""
        return self.dataset is not None or self.files[split] is not None

    def _check_settings(self) -> None:
        problems = []
        if self.dataset is not None and any(self.files.values()):
            problems.append("give either data.dataset or files, not both")
        if self.dataset is None and (self.dataset_config or self.dataset_splits):
            problems.append("dataset_config and dataset_splits need data.dataset")
        unknown = sorted(set(self.dataset_splits) - set(self.files))
        if unknown:
            near = nearest(unknown[0], self.files)
            problems.append(f"dataset_splits has no use for {unknown[0]!r}{near}")
        if len(self.text_columns) not in (1, 2):
            problems.append("text_column takes one column or two")
        if not 0 < self.validation_share < 1:
            problems.append(f"validation_share is {self.validation_share}, not between 0 and 1")
        for name in ("max_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, not at least 1")
        if problems:
            raise ConfigError("Settings of data: " + "; ".join(problems) + ".")

    def _module(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    def _table(self, split: str) -> Table:
        if split not in self._tables:
            if split in ("train", "validation") and self._holds_out():
                self._divide_training_rows()
            else:
                self._tables[split] = self._checked(self._read(split))
        return self._tables[split]

    def _holds_out(self) -> bool:
        if self.dataset is None:
            return self.files["validation"] is None and self.files["train"] is not None
        loaded = load_hub_dataset(self.dataset, self.dataset_config)
        return self._split_name("validation") not in loaded

    def _divide_training_rows(self) -> None:
        table = self._checked(self._read("train"))
        held_out = round(len(table) * self.validation_share)
        if not 0 < held_out < len(table):
            raise DataError(
                f"{table.source} has {len(table)} rows, too few to hold out a share of "
                f"{self.validation_share:g} for validation. Give data.validation_file."
            )
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(len(table), generator=generator).tolist()
        self._tables["validation"] = table.select(sorted(order[:held_out]))
        self._tables["train"] = table.select(sorted(order[held_out:]))

    def _read(self, split: str) -> Table:
        if self.dataset is not None:
            loaded = load_hub_dataset(self.dataset, self.dataset_config)
            return hub_table(
                loaded, self.dataset, split, self._split_name(split), self.label_column
            )
        file = self.files[split]
        if file is None:
            raise DataError(
                f"There are no {split} data: set data.{split}_file"
                + (" or data.train_file." if split == "validation" else ".")
            )
        return read_table(file, self.quoting)

    def _split_name(self, split: str) -> str:
        default = "test" if split == "predict" else split
        return self.dataset_splits.get(split, default)

    def _checked(self, table: Table) -> Table:
        for name in self.text_columns:
            for row, value in enumerate(table.column(name, "data.text_column")):
                if is_empty(value):
                    raise DataError(
                        f"{table.where(row)}: the column {name!r} is empty. Remove the row or "
                        "fill it in."
                    )
        return table

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        table, labels = self._table(split), None
        if split != "predict":
            if self.class_names is None:
                raise DataError("The class names are not known before `setup` has run.")
            labels = encode_labels(table, self.label_column, self.class_names)
        if self.num_workers:
            # The tokenizer's own threads deadlock in forked workers.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            TextRows([table.columns[name] for name in self.text_columns], labels),
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=TokenizingCollator(self.tokenizer, self.max_length),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
