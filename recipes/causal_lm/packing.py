"""Several examples in one sequence, so that next to nothing of what is computed is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Examples that are distributed together: enough for full sequences, few enough for any memory.
_WINDOW = 100_000
_READ = 64


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over sequences: best-fit decreasing.

    From the longest to the shortest, each goes where it leaves the least room, or into a sequence
    of its own.

    Args:
        lengths: Tokens of each example, none above the capacity.
        capacity: Tokens of a sequence at most.

    Returns:
        The examples of each sequence by number, in rising order; sequences in the order of their
        first examples.

    Example:
        >>> pack([5, 3, 4, 2, 2], capacity=8)
        [[0, 1], [2, 3, 4]]
    """
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}
    # Bit r is set where a sequence has room for r tokens: the smallest room that is large enough is
    # then the lowest bit from the length on.
    rooms = 0
    values = np.asarray(lengths)
    for example in np.argsort(-values, kind="stable").tolist():
        length = int(values[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(example)
        left = room - length
        if left:
            open_bins.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    return sorted(sorted(examples) for examples in bins)


def packed_rows(examples: Any, capacity: int) -> Iterator[dict[str, Any]]:
    """Yield sequences of examples.

    Args:
        examples: A `datasets.Dataset` of examples in the numpy format with `input_ids`, `trained`
            and `length`.
        capacity: Tokens of a sequence at most.

    Yields:
        `input_ids` and `trained` of all examples one after the other, their lengths as `parts`,
        the sequence's `length`, and its number as `row`.
    """
    lengths, number = examples["length"][:], 0
    for start in range(0, len(lengths), _WINDOW):
        bins = pack(lengths[start : start + _WINDOW], capacity)
        for first in range(0, len(bins), _READ):
            group = bins[first : first + _READ]
            read = examples[[start + example for members in group for example in members]]
            for row in _joined(read, [len(members) for members in group]):
                yield {**row, "row": number}
                number += 1


def _joined(read: dict[str, Any], counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Put the next so many examples together, and the next, and so on."""
    place = 0
    for count in counts:
        chosen = slice(place, place + count)
        place += count
        ids = np.concatenate(list(read["input_ids"][chosen]))
        yield {
            "input_ids": ids,
            "trained": np.concatenate(list(read["trained"][chosen])),
            "parts": np.asarray(read["length"][chosen], dtype=np.int32),
            "length": len(ids),
        }
