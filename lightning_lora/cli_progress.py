"""A line on the terminal that says how far a command is."""

from __future__ import annotations

import sys
from collections.abc import Callable


def progress_line(doing: str) -> Callable[[int, int, str], None]:
    """A function to call before each step; it writes to a terminal alone.

    Args:
        doing: Stands in front: `"merging"`.

    Returns:
        Called with how many steps are done, of how many, and what the next one is.
    """

    def show(done: int, count: int, what: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if done + 1 == count else "\r"
            print(f"\033[K{doing} {done + 1}/{count} {what}", end=end, file=sys.stderr, flush=True)

    return show
