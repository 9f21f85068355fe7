"""Tables as text, for `print` and logs."""

from __future__ import annotations

from typing import Any


def as_text(table: Any) -> str:
    """What rich shows of a table, 100 columns wide and without colours."""
    from rich.console import Console

    console = Console(width=100, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
