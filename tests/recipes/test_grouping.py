"""Batches of like length: every row once, little padding, another order each epoch."""

from __future__ import annotations

import random

import pytest

from lightning_lora.recipes.grouping import GroupedSampler, padding_share

LENGTHS = [random.Random(seed).randint(3, 60) for seed in range(1003)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_and_the_short_batch_last(shuffle: bool) -> None:
    order = list(GroupedSampler(LENGTHS, 8, shuffle))
    assert sorted(order) == list(range(1003))
    batches = [order[start : start + 8] for start in range(0, 1003, 8)]
    spread = [max(LENGTHS[r] for r in b) - min(LENGTHS[r] for r in b) for b in batches[:-1]]
    assert max(spread) <= 4 + 4 * shuffle, "within a window lengths are near"


def test_padding_falls_below_five_percent_from_a_third() -> None:
    drawn = random.Random(0).sample(range(1003), 1003)
    assert padding_share(LENGTHS, drawn, 8) > 0.35
    for epoch in range(3):
        sampler = GroupedSampler(LENGTHS, 8, shuffle=True)
        sampler.set_epoch(epoch)
        assert padding_share(LENGTHS, list(sampler), 8) < 0.05


def test_epochs_differ_and_the_same_epoch_does_not() -> None:
    orders = []
    for epoch in (0, 1, 0):
        sampler = GroupedSampler(LENGTHS, 8, shuffle=True, seed=5)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    groups = [{frozenset(order[:8]) for order in orders[:1]}, {frozenset(orders[1][:8])}]
    assert groups[0] != groups[1], "other rows meet"
    fixed = GroupedSampler(LENGTHS, 8, shuffle=False)
    first = list(fixed)
    fixed.set_epoch(3)
    assert list(fixed) == first


def test_the_first_batches_of_an_evaluation_are_like_the_rest() -> None:
    order = list(GroupedSampler(LENGTHS, 8, shuffle=False))
    head = [LENGTHS[row] for row in order[:160]]
    assert 20 < sum(head) / len(head) < 43, "neither the longest nor the shortest"


@pytest.mark.parametrize("rows", [1003, 1000, 3, 1])
def test_ranks_share_every_row_alike(rows: int) -> None:
    lengths = LENGTHS[:rows]
    parts = [list(GroupedSampler(lengths, 4, True, 0, num_replicas=2, rank=r)) for r in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == -(-rows // 2)
    together = parts[0] + parts[1]
    assert set(together) == set(range(rows))
    assert len(together) - rows == rows % 2, "at most one row is repeated"
    whole = list(GroupedSampler(lengths, 8, True, 0))
    for step in range(rows // 8):
        batch = {*parts[0][4 * step : 4 * step + 4], *parts[1][4 * step : 4 * step + 4]}
        assert batch == set(whole[8 * step : 8 * step + 8]), "the batch of one process twice as big"
