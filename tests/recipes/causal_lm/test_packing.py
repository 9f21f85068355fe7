"""Examples distributed over sequences with hardly a gap."""

from __future__ import annotations

import random

import datasets
import numpy as np
import pytest

from lightning_lora.recipes.causal_lm import packing
from lightning_lora.recipes.causal_lm.packing import pack, packed_rows


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_sequence_that_holds_it(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.randint(10, 200)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 400))]
    bins = pack(lengths, capacity)
    assert sorted(example for members in bins for example in members) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in members) <= capacity for members in bins)
    # Best-fit decreasing leaves no two sequences that would fit into one.
    sizes = sorted(sum(lengths[n] for n in members) for members in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


def test_the_tightest_sequence_is_taken() -> None:
    assert pack([6, 5, 4, 3], capacity=10) == [[0, 2], [1, 3]]
    assert pack([10, 10], capacity=10) == [[0], [1]]


def test_examples_as_long_as_sentences_leave_less_than_two_per_cent() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(20, 120) for _ in range(3000)]
    bins = pack(lengths, 512)
    assert 1 - sum(lengths) / (512 * len(bins)) < 0.02


@pytest.mark.parametrize("window", [17, 1000])
def test_packed_rows_are_their_examples_one_after_the_other(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_WINDOW", window)
    draw = random.Random(0)
    examples = []
    for number in range(200):
        length = draw.randint(2, 9)
        ids = np.arange(number * 10, number * 10 + length, dtype=np.int32)
        examples.append({"input_ids": ids, "trained": ids % 3 == 0, "length": length})
    rows = datasets.Dataset.from_list(
        [{**row, "input_ids": list(row["input_ids"]), "trained": list(row["trained"])}
         for row in examples]
    ).with_format("numpy")  # fmt: skip
    packed = list(packed_rows(rows, 16))
    assert [row["row"] for row in packed] == list(range(len(packed)))
    seen = []
    for row in packed:
        assert row["length"] == len(row["input_ids"]) == row["parts"].sum() <= 16
        borders = np.cumsum(row["parts"])[:-1]
        for ids, trained in zip(
            np.split(row["input_ids"], borders), np.split(row["trained"], borders), strict=True
        ):
            original = examples[ids[0] // 10]
            seen.append(int(ids[0]) // 10)
            assert ids.tolist() == original["input_ids"].tolist()
            assert trained.tolist() == original["trained"].tolist()
    assert sorted(seen) == list(range(200))
