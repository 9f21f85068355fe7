"""What the recipes' data modules share: splits, tokenizer, prepared rows, and their batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, SequentialSampler

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.files import Table, nearest, read_table
from lightning_lora.recipes.grouping import GroupedSampler
from lightning_lora.recipes.hub_data import hub_table, load_hub_dataset

SPLITS = ("train", "validation", "test", "predict")
_STAGES = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class RecipeDataModule(LightningDataModule):
    """Rows from files or from a dataset on the hub, tokenized once, in batches of like length.

    Subclasses implement `encode` and `collator`; those whose files are no tables of columns also
    `read_split`.

    Args:
        train_file: File to train on. `bundled:` paths point into the installed package.
        validation_file: File to validate on. Without it a share of the training rows is held out.
        test_file: File to test on.
        predict_file: File to predict.
        dataset: Dataset on the Hugging Face hub, instead of files.
        dataset_config: Configuration of that dataset, such as `sst2` of `nyu-mll/glue`.
        dataset_splits: Split for each of `train`, `validation`, `test` and `predict` where its
            name differs.
        validation_share: Share of the training rows to validate on without a validation file.
        split_seed: Seed of that division, which is the same in every run.
        quoting: Whether `"` quotes fields in CSV and TSV files; by default in CSV files only.
        max_length: Longest input in tokens.
        batch_size: Rows in a training batch.
        eval_batch_size: Rows in a batch elsewhere; by default the training batch's.
        num_workers: Processes that prepare batches.
        shuffle: Whether each epoch takes the training rows in a new order.
        group_by_length: Whether batches hold rows of like length, which saves most of the padding.
        tokenizer: Tokenizer for models other than the recipe's: its hub name or folder.
        cache_dir: Folder of the tokenized rows; by default `~/.cache/lightning_lora`.

    Raises:
        ConfigError: If settings contradict each other.
    """

    label_column: str | list[str] | None = None

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_splits: dict[str, str] | None = None,
        validation_share: float = 0.1,
        split_seed: int = 0,
        quoting: bool | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        group_by_length: bool = True,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
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
        self.validation_share = validation_share
        self.split_seed = split_seed
        self.quoting = quoting
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.cache_dir = cache_dir
        self._tokenizer_name = tokenizer
        self._tokenizer: Any = None
        self._tables: dict[str, Table] = {}
        self._encoded: dict[str, Any] = {}

    # ---- what a recipe adds -------------------------------------------------------------------

    def encode(self, split: str) -> Any:
        """Return the tokenized rows of a split; subclasses implement it.

        Args:
            split: One of `train`, `validation`, `test`, `predict`.

        Returns:
            A `datasets.Dataset` with the number of tokens of each row in the column `length`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how rows are tokenized.")

    def collator(self, split: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of rows; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how batches are made.")

    def read_split(self, split: str) -> Table:
        """Read the rows of a split from its file or dataset.

        Raises:
            DataError: If there are none, or they cannot be read.
        """
        if self.dataset is not None:
            return self.read_hub_split(split, self.split_name(split))
        return read_table(self.file_of(split), self.quoting, self.cache_dir)

    def divide_rows(self, table: Table) -> tuple[list[int], list[int]]:
        """Return which training rows are trained on and which are held out for validation.

        Subclasses whose rows must not be parted from each other implement it with `divide_groups`.

        Raises:
            DataError: If one part would be empty.
        """
        return self.divide(len(table), table.source)

    def check_table(self, table: Table) -> None:
        """Refuse rows that the recipe cannot use; subclasses may implement it.

        Raises:
            DataError: Which row, and what is wrong with it.
        """

    def check_settings(self) -> list[str]:
        """Return what is wrong with the settings; subclasses add to it."""
        problems = []
        if self.dataset is not None and any(self.files.values()):
            problems.append("give either data.dataset or files, not both")
        if self.dataset is None and (self.dataset_config or self.dataset_splits):
            problems.append("dataset_config and dataset_splits need data.dataset")
        unknown = sorted(set(self.dataset_splits) - set(self.files))
        if unknown:
            near = nearest(unknown[0], self.files)
            problems.append(f"dataset_splits has no use for {unknown[0]!r}{near}")
        if not 0 < self.validation_share < 1:
            problems.append(f"validation_share is {self.validation_share}, not between 0 and 1")
        for name in ("max_length", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, not at least 1")
        return problems

    # ---- what a recipe gets -------------------------------------------------------------------

    def require_good_settings(self) -> None:
        """Report everything that `check_settings` finds at once; constructors end with it.

        Raises:
            ConfigError: If there is anything.
        """
        problems = self.check_settings()
        if problems:
            raise ConfigError("Settings of data: " + "; ".join(problems) + ".")

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
                self._tokenizer = getattr(self.module, "tokenizer", None)
        if self._tokenizer is None:
            raise ConfigError(
                "The data need a tokenizer: set data.tokenizer, or use a model with an attribute "
                "`tokenizer`."
            )
        return self._tokenizer

    @property
    def module(self) -> Any:
        """The trainer's LightningModule; None without a trainer."""
        return None if self.trainer is None else self.trainer.lightning_module

    def file_of(self, split: str) -> str:
        """Return the file of a split.

        Raises:
            DataError: If the settings name none.
        """
        file = self.files[split]
        if file is None:
            raise DataError(
                f"There are no {split} data: set data.{split}_file"
                + (" or data.train_file." if split == "validation" else ".")
            )
        return file

    def split_name(self, split: str) -> str:
        """Return what the dataset calls a split."""
        default = "test" if split == "predict" else split
        return self.dataset_splits.get(split, default)

    def read_hub_split(self, split: str, name: str) -> Table:
        """Read a split of the dataset by its name there.

        Raises:
            DataError: If the dataset cannot be loaded or has no such split.
        """
        assert self.dataset is not None
        loaded = load_hub_dataset(self.dataset, self.dataset_config)
        return hub_table(loaded, self.dataset, split, name, self.label_column)

    def provides(self, split: str) -> bool:
        """Say whether the settings name data for `train`, `validation`, `test` or `predict`."""
        return self.dataset is not None or self.files[split] is not None

    def table(self, split: str) -> Table:
        """Return the rows of a split, read once; some training rows are held out where needed.

        Raises:
            DataError: If there are none, or too few to hold some out.
        """
        if split not in self._tables:
            if split in ("train", "validation") and self.holds_out():
                self._divide_training_rows()
            else:
                self._tables[split] = self._read(split)
        return self._tables[split]

    def encoded(self, split: str) -> Any:
        """Return the tokenized rows of a split, made once."""
        if split not in self._encoded:
            self._encoded[split] = self.encode(split)
        return self._encoded[split]

    def holds_out(self) -> bool:
        """Say whether the validation rows are taken from the training rows."""
        if self.dataset is None:
            return self.files["validation"] is None and self.files["train"] is not None
        loaded = load_hub_dataset(self.dataset, self.dataset_config)
        return self.split_name("validation") not in loaded

    def divide(self, rows: int, source: str) -> tuple[list[int], list[int]]:
        """Divide row numbers into those to train on and those held out, the same in every run.

        Args:
            rows: How many rows there are.
            source: Where they are from, for the message.

        Raises:
            DataError: If one part would be empty.
        """
        held_out = round(rows * self.validation_share)
        if not 0 < held_out < rows:
            raise DataError(
                f"{source} has {rows} rows, too few to hold out a share of "
                f"{self.validation_share:g} for validation. Give data.validation_file."
            )
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(rows, generator=generator).tolist()
        return sorted(order[held_out:]), sorted(order[:held_out])

    def divide_groups(self, groups: Sequence[int], source: str) -> tuple[list[int], list[int]]:
        """Divide rows as `divide` does, with all rows of a group in one part.

        Args:
            groups: The group of each row, numbered from 0 on.
            source: What the groups are and where they are from, for the message.

        Raises:
            DataError: If one part would be empty.
        """
        chosen = set(self.divide(max(groups) + 1, source)[1])
        train = [row for row, group in enumerate(groups) if group not in chosen]
        return train, [row for row, group in enumerate(groups) if group in chosen]

    def _read(self, split: str) -> Table:
        table = self.read_split(split)
        self.check_table(table)
        return table

    def _divide_training_rows(self) -> None:
        table = self._read("train")
        train, held_out = self.divide_rows(table)
        self._tables["train"] = table.select(train)
        self._tables["validation"] = table.select(held_out)

    # ---- Lightning's hooks --------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download the dataset, on one process only."""
        if self.dataset is not None:
            load_hub_dataset(self.dataset, self.dataset_config)

    def setup(self, stage: str) -> None:
        """Read the rows that the stage needs.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            DataError: If data for the stage are missing or not what the settings say.
        """
        for split in _STAGES[stage]:
            self.table(split)

    def train_dataloader(self) -> Any:
        """Return batches of the training rows."""
        return self.loader("train")

    def val_dataloader(self) -> Any:
        """Return batches of the validation rows."""
        return self.loader("validation")

    def test_dataloader(self) -> Any:
        """Return batches of the test rows."""
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        """Return batches of the rows to predict."""
        return self.loader("predict")

    def loader(self, split: str) -> DataLoader:
        """Return the batches of a split; under several ranks, this rank's share of each."""
        rows = self.encoded(split)
        training = split == "train"
        size = self.batch_size if training else self.eval_batch_size
        if self.num_workers:
            # Tokenizers warn about their own threads in forked workers, which only pad.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            rows,
            batch_size=size,
            sampler=self._sampler(rows, split, size),
            collate_fn=self.collator(split),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _sampler(self, rows: Any, split: str, size: int) -> Any:
        shuffle = split == "train" and self.shuffle
        if not shuffle and (split == "train" or not self.group_by_length):
            return SequentialSampler(rows)
        # Under several ranks Lightning would shuffle a sampler of its own in between.
        shares = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        lengths = (
            rows.with_format("numpy")["length"][:] if self.group_by_length else [1] * len(rows)
        )
        return GroupedSampler(
            lengths, size, shuffle, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)), **shares
        )
