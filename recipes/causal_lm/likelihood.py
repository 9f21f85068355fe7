"""Perplexity over all tokens of an evaluation, each row once, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

RowSums = dict[str, np.ndarray]


def row_sums(losses: Tensor, targets: Tensor, rows: Tensor) -> RowSums:
    """Return what each row adds to the perplexity.

    Args:
        losses: Floating point `[rows, tokens]`, 0 where nothing is predicted.
        targets: Bool `[rows, tokens]`: where something is.
        rows: int64 `[rows]`, the numbers of the rows.

    Returns:
        `row` int64, `loss` float64 and `tokens` int64, each `[rows]`.
    """
    return {
        "row": rows.cpu().numpy(),
        "loss": losses.sum(1).cpu().double().numpy(),
        "tokens": targets.sum(1).cpu().numpy(),
    }


def gather_sums(own: Iterable[RowSums], world_size: int) -> RowSums:
    """Return the sums of all ranks, each row once and in order; a collective call.

    A distributed sampler repeats rows to even out the ranks; the row numbers undo that.

    Args:
        own: This rank's sums.
        world_size: How many ranks there are.
    """
    parts = list(own)
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, parts)
        parts = [part for rank in gathered for part in rank]
    if not parts:
        return {}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, first = np.unique(joined["row"], return_index=True)
    return {name: values[first] for name, values in joined.items()}


def perplexity(sums: RowSums) -> dict[str, float]:
    """Return the mean loss over all tokens as `loss`, and its exponential as `perplexity`.

    Example:
        >>> short, long = math.log(8), 3 * math.log(2)
        >>> found = perplexity({"loss": np.array([short, long]), "tokens": np.array([1, 3])})
        >>> round(found["perplexity"], 4)  # not 5, the mean of the rows' perplexities
        2.8284
    """
    loss = math.fsum(sums["loss"]) / int(sums["tokens"].sum())
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
