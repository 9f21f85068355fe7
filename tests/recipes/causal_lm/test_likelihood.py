"""Sums of losses by row: each row once, whatever ranks and batches it was in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_lora.recipes.causal_lm.likelihood import perplexity, row_sums
from lightning_lora.recipes.predictions import gather_arrays


def test_rows_that_a_sampler_repeats_count_once() -> None:
    losses = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0], [8.0, 8.0, 8.0]])
    targets = losses > 0
    parts = [
        row_sums(losses[:2], targets[:2], torch.tensor([7, 3])),
        row_sums(losses[[2, 1]], targets[[2, 1]], torch.tensor([5, 3])),
    ]
    sums = gather_arrays(parts, "row", world_size=1)
    assert sums["row"].tolist() == [3, 5, 7]
    assert sums["loss"].tolist() == [4, 24, 3]
    assert sums["tokens"].tolist() == [1, 3, 2]
    found = perplexity(sums)
    assert found == {"loss": 31 / 6, "perplexity": pytest.approx(math.exp(31 / 6))}


def test_a_loss_beyond_all_numbers_is_an_infinite_perplexity() -> None:
    sums = {"loss": np.array([2000.0]), "tokens": np.array([2])}
    assert perplexity(sums) == {"loss": 1000.0, "perplexity": math.inf}
    assert gather_arrays([], "row", world_size=1) == {}
