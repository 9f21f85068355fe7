"""The closing block of a command: the scores, what was written where, and what to type next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_lora.history import History, best_point, stage_of, value_at


@dataclass(frozen=True)
class Scores:
    """A table of metrics: a row for each metric, a column for each moment.

    Attributes:
        columns: For each column's heading the values by metric.
        first: The metric in the first row; the others follow by name.
    """

    columns: dict[str, Mapping[str, float]] = field(default_factory=dict)
    first: str | None = None

    def __bool__(self) -> bool:
        return any(self.columns.values())

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("metric", vertical="bottom")
        for heading in self.columns:
            table.add_column(heading, justify="right", vertical="bottom")
        names = sorted({name for values in self.columns.values() for name in values})
        for name in sorted(names, key=lambda name: name != self.first):
            row = [values.get(name) for values in self.columns.values()]
            table.add_row(Text(name), *readable_numbers(row))
        return table


def fit_scores(
    history: History, monitor: str | None, mode: str, latest: Mapping[str, float]
) -> Scores:
    r"""Return the table at the end of a fit: the best evaluation beside the last.

    Args:
        history: The course of the fit; empty where nothing was logged to a file.
        monitor: The metric that the best checkpoint is chosen by.
        mode: `"max"` or `"min"`: which of its values is the best.
        latest: The metrics at the end, which are all there is to show without a validation.

    Example:
        >>> from lightning_lora.history import Point
        >>> history = {"val/f1": [Point(10, 1, 0.5), Point(20, 2, 0.7), Point(30, 3, 0.6)]}
        >>> fit_scores(history, "val/f1", "max", {}).columns["last\nepoch 3, step 30"]
        {'val/f1': 0.6}
    """
    shown = [name for name in history if stage_of(name)[0] == "val"]
    if not shown:
        return Scores({"last": latest})
    columns: dict[str, Mapping[str, float]] = {}
    best = best_point(history.get(monitor or "", ()), mode)
    last = max((history[name][-1] for name in shown), key=lambda point: point.step)
    for title, point in ((f"best by {monitor}", best), ("last", last)):
        if point is not None:
            values = {name: value_at(history[name], point.step) for name in shown}
            columns[f"{title}\n{point.when()}"] = {
                name: value for name, value in values.items() if value is not None
            }
    return Scores(columns, first=monitor)


@dataclass
class Summary:
    """What a command has done.

    Attributes:
        title: The block's title.
        scores: The metrics.
        files: What was written, by what it is. Paths that are not there are left out.
        commands: What to type next, each with what it is for.
    """

    title: str
    scores: Scores = field(default_factory=Scores)
    files: Mapping[str, Path] = field(default_factory=dict)
    commands: Sequence[tuple[str, str]] = ()

    def __rich__(self) -> Panel:
        parts: list[RenderableType] = []
        if self.scores:
            parts.append(self.scores)
        written = {label: path for label, path in self.files.items() if path.exists()}
        if written:
            files = _grid(("left", "right", "left"))
            for label, path in written.items():
                files.add_row(label, readable_size(size_of(path)), Text(str(path), overflow="fold"))
            parts.append(files)
        for purpose, command in self.commands:
            parts.append(Text(f"{purpose}:\n  {command}", overflow="fold"))
        spaced = [item for part in parts for item in (Text(), part)][1:]
        return Panel(Group(*spaced), title=Text(self.title), title_align="left", expand=False)


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


def readable_numbers(values: Sequence[float | None]) -> list[str]:
    """Write the values of one metric with as many decimals each, so that they compare at a glance.

    >>> readable_numbers([0.5, 0.92754, None])
    ['0.5000', '0.9275', '-']
    >>> readable_numbers([79.4321, 1204.9])
    ['79', '1,205']
    """
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    if 0 < largest < 0.01:
        style = ".3g"
    else:
        decimals = next((d for limit, d in ((10, 4), (1000, 2)) if largest < limit), 0)
        style = f",.{decimals}f"
    return ["-" if value is None else format(value, style) for value in values]


def _grid(justify: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(justify=side)  # type: ignore[arg-type]
    return table
