"""Columns that lie on disk: some of their values, and reading in pieces.

Value by value, a memory-mapped column takes ten times as long as in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_PIECE = 256


class Selection(Sequence):
    """Some values of a column, looked up when they are asked for.

    Args:
        values: The column.
        rows: Which of its values, in which order.

    Example:
        >>> list(Selection(["a", "b", "c"], [2, 0]))
        ['c', 'a']
    """

    def __init__(self, values: Sequence[Any], rows: Sequence[int]) -> None:
        self.values = values
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _at(self.values, self.rows[place])
        return self.values[self.rows[place]]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _PIECE):
            yield from self[first : first + _PIECE]


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
    return column if isinstance(column, (list, ReadAhead)) else ReadAhead(column)


def _at(values: Any, rows: Sequence[int]) -> list[Any]:
    if isinstance(values, list):
        return [values[row] for row in rows]
    if isinstance(values, Selection):
        return _at(values.values, [values.rows[row] for row in rows])
    # A column of `datasets` takes the places of all values at once.
    return list(values[list(rows)])
