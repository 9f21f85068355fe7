"""Columns on disk are read in pieces, and give what they hold."""

from __future__ import annotations

import random
from typing import Any

from lightning_lora.recipes.columns import ReadAhead, Selection, read_ahead


class Counted(list):
    """A column that counts how often it is read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        self.reads += 1
        return super().__getitem__(place)


def test_a_column_is_read_in_pieces() -> None:
    column = Counted(range(1000))
    quick = ReadAhead(column)
    assert list(quick) == list(range(1000))
    assert column.reads == 4
    assert len(quick) == 1000
    assert [quick[row] for row in (-1, 0, 999, 256)] == [999, 0, 999, 256]
    places = random.Random(0).choices(range(1000), k=50)
    assert [quick[row] for row in places] == places


def test_columns_of_a_dataset_and_selections_of_them() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"x": [f"v{number}" for number in range(700)]})
    column = read_ahead(rows["x"])
    assert isinstance(column, ReadAhead)
    assert list(column) == [f"v{number}" for number in range(700)]
    chosen = Selection(rows["x"], [699, 3, 300])
    assert list(chosen) == list(read_ahead(chosen)) == ["v699", "v3", "v300"]
    assert (chosen[1], chosen[1:], len(chosen)) == ("v3", ["v3", "v300"], 3)
    again = Selection(Selection(["a", "b", "c"], [2, 0]), [1, 0])
    assert list(again) == again[:] == ["a", "c"]


def test_columns_in_memory_stay_as_they_are() -> None:
    column = ["a", "b"]
    assert read_ahead(column) is column
