"""The confusion matrix of a classifier as a PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.figures import new_figure, save

MOST_CLASSES = 200
"""With more classes the cells would be dots."""

_POINTS = 72.0
_LONGEST_NAME = 26
_SMALL_FONT, _SMALLEST_FONT = 7.0, 4.0
_LARGEST = 18.0
# Letters of the figures' font are this wide, as a share of their size.
_LETTER = 0.62


def draw_confusion_matrix(
    counts: Any, class_names: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw how often rows of each class were predicted as each class.

    The colour of a cell is its share of the row, so that rare classes show as well as frequent
    ones; the number in it is the count. Cells too small for numbers are left without.

    Args:
        counts: Tensor or array `[C, C]` of counts: the rows are the true classes, the columns the
            predicted ones.
        class_names: The C names, in the order of the rows. Long ones are shortened.
        path: The PNG file, which appears when it is complete.
        title: Stands above the matrix.

    Raises:
        ValueError: If the shapes do not fit.
    """
    table = [[int(count) for count in row] for row in counts.tolist()]
    size = len(class_names)
    if len(table) != size or any(len(row) != size for row in table):
        shape = tuple(counts.shape)
        raise ValueError(f"counts has the shape {shape}; {size} class names need {(size, size)}.")
    names = [shorten(str(name)) for name in class_names]
    side = max(2.4, min(0.75 * size, max(0.28 * size, 9.0)))
    side = min(side, _LARGEST)
    cell = _POINTS * side / size
    font = max(10.0, 8.0 + 0.4 * side)
    figure = new_figure(side + 1.0, side)
    axis = figure.add_axes((0.0, 0.0, side / (side + 1.0), 1.0))
    shares = [[count / sum(row) if sum(row) else math.nan for count in row] for row in table]
    _draw_scale(figure, _draw_shares(axis, shares), side, font)
    _draw_counts(axis, table, shares, cell)
    _name_classes(axis, names, cell)
    axis.set_xlabel("predicted class", fontsize=font)
    axis.set_ylabel("true class", fontsize=font)
    axis.set_title(title, fontsize=font + 1, fontweight="bold", pad=10, parse_math=False)
    save(figure, path)


def shorten(name: str, longest: int = _LONGEST_NAME) -> str:
    """Cut the middle out of a long name; names often differ at either end.

    >>> shorten("a name that goes on and on and on")
    'a name that g…nd on and on'
    """
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    head = longest // 2
    return f"{name[:head].rstrip()}…{name[head + 1 - longest :].lstrip()}"


def _draw_shares(axis: Any, shares: list[list[float]]) -> Any:
    from matplotlib import colormaps

    # One hue from light to dark, which is read without telling colours apart. Classes without rows
    # are grey.
    image = axis.imshow(shares, cmap=colormaps["Blues"].with_extremes(bad="0.9"), vmin=0, vmax=1)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    borders = [place - 0.5 for place in range(1, len(shares))]
    axis.set_xticks(borders, minor=True)
    axis.set_yticks(borders, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5 if len(shares) <= 20 else 0.5)
    axis.tick_params(which="minor", length=0)
    return image


def _draw_scale(figure: Any, image: Any, side: float, font: float) -> None:
    """Draw what the colours mean to the right of the matrix, which is `side` inches wide."""
    whole, height = side + 1.0, min(4.0, side)
    place = ((side + 0.25) / whole, 1.0 - height / side, 0.2 / whole, height / side)
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.set_label("share of the true class", fontsize=font)
    bar.outline.set_visible(False)


def _name_classes(axis: Any, names: Sequence[str], cell: float) -> None:
    """Write the names beside the rows and below the columns, which are `cell` points wide."""
    font = max(_SMALLEST_FONT, min(10.0, 0.72 * cell))
    places = range(len(names))
    axis.set_yticks(places, names, fontsize=font, parse_math=False)
    if max(map(len, names)) * _LETTER * font < 0.9 * cell:
        turn: dict[str, Any] = {}
    elif cell > 2.5 * font:
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    else:
        turn = {"rotation": 90}
    axis.set_xticks(places, names, fontsize=font, parse_math=False, **turn)


def _draw_counts(axis: Any, table: list[list[int]], shares: list[list[float]], cell: float) -> None:
    """Write the counts into cells that are `cell` points wide, as large as the longest allows."""
    for write, smallest in ((str, _SMALL_FONT), (compact, _SMALLEST_FONT)):
        texts = [[write(count) for count in row] for row in table]
        longest = max(len(text) for row in texts for text in row)
        font = min(11.0, 0.55 * cell, 0.85 * cell / (_LETTER * longest))
        if font >= smallest:
            break
    else:
        return
    blank_zeros = len(table) > 10
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if table[row][column] or not blank_zeros:
                colour = "white" if shares[row][column] > 0.55 else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=font, color=colour)


def compact(count: int) -> str:
    """Write a count in few letters.

    >>> compact(9999), compact(40432), compact(1234567)
    ('9999', '40k', '1.2M')
    """
    if count < 10_000:
        return str(count)
    if count < 1_000_000:
        return f"{count / 1000:.0f}k"
    return f"{count / 1_000_000:.1f}M"
