"""Windows into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_lora.recipes.question_answering.windows import NO_LABEL

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class WindowCollator:
    """Pads windows to the longest of a batch, on the side that the tokenizer pads.

    Args:
        tokenizer: Says what to pad with and where, and whether the model takes segment numbers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.left = tokenizer.padding_side == "left"
        padding = (tokenizer.pad_token_id, 0, tokenizer.pad_token_type_id)
        self.padding = {
            name: value
            for name, value in zip(INPUTS, padding, strict=True)
            if name in tokenizer.model_input_names
        }

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch.

        Args:
            rows: Windows as `windows_of` yields them, each with its number `window` and its
                question's row `example`.

        Returns:
            The model's inputs `[windows, tokens]`. `cls`, `start`, `end` and `context_start`
            `[windows]`, counted with the padding. `offset_starts` and `offset_ends`
            `[windows, tokens]`, the characters that each token of context is from, and -1 for all
            other tokens; they and `start` and `end` where the rows have them. `window` and
            `example` `[windows]`.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        shifts = [width - length if self.left else 0 for length in lengths]
        batch: dict[str, np.ndarray] = {}
        for name, padding in self.padding.items():
            batch[name] = np.full((len(rows), width), padding, dtype=np.int64)
            for line, row, shift, length in zip(batch[name], rows, shifts, lengths, strict=True):
                # The mask is no column: it is one for every token of a window.
                line[shift : shift + length] = row.get(name, 1)
        if "cls" in rows[0]:
            batch["cls"] = _numbers(rows, "cls") + shifts
        if "start" in rows[0]:
            for name in ("start", "end"):
                stated = _numbers(rows, name)
                batch[name] = np.where(stated == NO_LABEL, NO_LABEL, stated + shifts)
        if "offset_starts" in rows[0]:
            first = _numbers(rows, "context_start") + shifts
            for name in ("offset_starts", "offset_ends"):
                batch[name] = np.full((len(rows), width), -1, dtype=np.int64)
                for line, row, place in zip(batch[name], rows, first, strict=True):
                    line[place : place + len(row[name])] = row[name]
        for name in ("window", "example"):
            batch[name] = _numbers(rows, name)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _numbers(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.int64)
