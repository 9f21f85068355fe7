"""Tokenized rows into batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_lora.recipes.causal_lm.losses import IGNORED


class ExampleCollator:
    """Pads examples, or packed sequences of them, on the right to the longest of a batch.

    Args:
        pad_token_id: What to pad with. It may be a token that is also trained: what is padding is
            told by the lengths.
        packed: Whether rows are packed sequences.
    """

    def __init__(self, pad_token_id: int, packed: bool) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch.

        Args:
            rows: With `input_ids`, `trained` and `row`; packed ones with `parts`.

        Returns:
            `input_ids` and `labels` int64 `[rows, tokens]`; a label is the token itself, or -100
            where it is not to be predicted: prompts, padding, and the first token of each example.
            `position_ids` of packed sequences, which start anew in each example and in the padding,
            else `attention_mask`, both `[rows, tokens]`. `columns` int64 `[columns]`, those from
            which some row predicts something. `row` int64 `[rows]`.
        """
        width = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), width)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        other = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            tokens = np.asarray(row["input_ids"])
            length = len(tokens)
            parts = [*np.asarray(row["parts"])] if self.packed else [length]
            starts = np.cumsum([0, *parts[:-1]])
            ids[number, :length] = tokens
            labels[number, :length] = np.where(row["trained"], tokens, IGNORED)
            labels[number, starts] = IGNORED
            if self.packed:
                positions = [np.arange(part) for part in (*parts, width - length)]
                other[number] = np.concatenate(positions)
            else:
                other[number, :length] = 1
        batch = {
            "input_ids": ids,
            "labels": labels,
            "position_ids" if self.packed else "attention_mask": other,
            "columns": np.flatnonzero((labels[:, 1:] != IGNORED).any(axis=0)),
            "row": np.array([row["row"] for row in rows], dtype=np.int64),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}


class PromptCollator:
    """Pads prompts on the left, where a generation does not begin.

    Args:
        pad_token_id: What to pad with.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        Args:
            rows: With `input_ids`, `prompt` and `row`, and `references` where there are some.

        Returns:
            `input_ids` and `attention_mask` int64 `[rows, tokens]`, `row` int64 `[rows]`, and the
            lists `prompt` and `references`.
        """
        width = max(len(row["input_ids"]) for row in rows)
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, width - length :] = row["input_ids"]
            mask[number, width - length :] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "row": torch.tensor([int(row["row"]) for row in rows]),
            "prompt": [str(row["prompt"]) for row in rows],
            "references": [list(map(str, row.get("references", ()))) for row in rows],
        }
