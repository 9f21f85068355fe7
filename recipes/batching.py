"""Rows of text into padded batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class TextRows(Dataset):
    """Rows of one or two texts, with their numbers and, where known, class numbers."""

    def __init__(self, texts: list[Sequence[Any]], labels: list[int] | None) -> None:
        self.texts = texts
        self.labels = labels

    def __len__(self) -> int:
        return len(self.texts[0])

    def __getitem__(self, row: int) -> dict[str, Any]:
        item: dict[str, Any] = {"row": row, "texts": [str(column[row]) for column in self.texts]}
        if self.labels is not None:
            item["label"] = self.labels[row]
        return item


class TokenizingCollator:
    """Tokenizes the texts of a batch and pads them to its longest."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `row`, the model's inputs and, for labelled rows, `labels`."""
        columns = [list(column) for column in zip(*(item["texts"] for item in rows), strict=True)]
        batch = dict(
            self.tokenizer(
                *columns,
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        batch["row"] = torch.tensor([item["row"] for item in rows])
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([item["label"] for item in rows])
        return batch
