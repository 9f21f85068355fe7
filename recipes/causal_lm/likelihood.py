"""Perplexity over all tokens of an evaluation, each row once, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
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
