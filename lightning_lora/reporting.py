"""The closing block of a command: the scores, what was written where, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


@dataclass
class Summary:
    """What a command has done.

    Attributes:
        title: The block's title.
        metrics: Scores by name.
        files: What was written, by what it is. Paths that are not there are left out.
        commands: What to type next, each with what it is for.
    """

    title: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    commands: Sequence[tuple[str, str]] = ()

    def __rich__(self) -> Panel:
        parts: list[RenderableType] = []
        if self.metrics:
            scores = _grid()
            for name in sorted(self.metrics):
                scores.add_row(name, f"{self.metrics[name]:.4g}")
            parts.append(scores)
        written = {label: path for label, path in self.files.items() if path.exists()}
        if written:
            files = _grid(("left", "right", "left"))
            for label, path in written.items():
                files.add_row(label, readable_size(size_of(path)), Text(str(path), overflow="fold"))
            parts.append(files)
        for purpose, command in self.commands:
            parts.append(Text(f"{purpose}:\n  {command}", overflow="fold"))
        spaced = [item for part in parts for item in (Text(), part)][1:]
        return Panel(Group(*spaced), title=self.title, title_align="left", expand=False)


def print_summary(summary: Summary) -> None:
    """Print a summary; where the output is no terminal, lines are left whole for copying."""
    console = Console()
    if not console.is_terminal:
        longest = max(
            [len(command) for _, command in summary.commands]
            + [len(str(path)) + 40 for path in summary.files.values()]
            + [72]
        )
        console = Console(width=longest + 8)
    console.print(summary)


def size_of(path: Path) -> int:
    """Return the bytes in a file, or in all files of a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def readable_size(count: int) -> str:
    """Write a number of bytes for people.

    >>> readable_size(1_740_000)
    '1.7 MB'
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _grid(justify: Sequence[str] = ("left", "right")) -> Table:
    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(justify=side)  # type: ignore[arg-type]
    return table
