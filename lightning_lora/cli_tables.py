"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 110


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; nothing if it has no rows.

    Args:
        title: Stands above it.
        columns: Their names; all but the first hold numbers.
        rows: Plain text.
    """
    if not rows:
        return
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(
            name, justify="right" if place else "left", no_wrap=place > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=_WIDTH, color_system=None).print(table)
