"""Columns that lie on disk, read in pieces: value by value it would take ten times as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_lora.recipes.files import Selection

_PIECE = 256


class ReadAhead(Sequence):
    """A column whose values are read together with their neighbours, for those who go row by row.

    Args:
        values: The column; its slices are lists of values.

    Example:
        >>> column = ReadAhead(["a", "b", "c"])
        >>> column[2], column[-3], list(column), column[1:]
        ('c', 'a', ['a', 'b', 'c'], ['b', 'c'])
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        self._first = -1
        self._piece: Sequence[Any] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.values[place]
        row = range(len(self))[place]
        first = row - row % _PIECE
        if first != self._first:
            self._first, self._piece = first, self.values[first : first + _PIECE]
        return self._piece[row - first]


def read_ahead(column: Sequence[Any]) -> Sequence[Any]:
    """Return a column that is quick to go through; one in memory is as it is."""
    if isinstance(column, list):
        return column
    if isinstance(column, Selection):
        return Selection(read_ahead(column.values), column.rows)
    return ReadAhead(column)
