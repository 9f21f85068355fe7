"""The course of a run: its metrics step by step, as Lightning's CSV logger wrote them.

Nothing here imports torch.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.csv"
_EARLIER = re.compile(r"metrics_(\d+)\.csv")
_STAGE = re.compile(r"(train|val|valid|validation)[/_](.+)")


@dataclass(frozen=True)
class Point:
    """A metric at one moment of a run.

    Attributes:
        step: Optimizer steps done by then.
        epoch: The epoch it belongs to, counted from 1; None where the logger was not told.
        value: The value, which may be NaN.
    """

    step: int
    epoch: int | None
    value: float

    def when(self) -> str:
        """Say which moment this is.

        >>> Point(step=315, epoch=5, value=0.9).when()
        'epoch 5, step 315'
        """
        return (
            f"step {self.step}" if self.epoch is None else f"epoch {self.epoch}, step {self.step}"
        )


History = Mapping[str, list[Point]]
"""For each metric its points, in the order of the steps."""


def metrics_files(run_dir: Path) -> list[Path]:
    """Return the files of a run's metrics, oldest first.

    Args:
        run_dir: The run's folder. A run that was resumed has `metrics_1.csv`, `metrics_2.csv` and
            so on for its earlier parts.
    """
    earlier = [
        (int(match[1]), path)
        for path in run_dir.glob("metrics_*.csv")
        if (match := _EARLIER.fullmatch(path.name))
    ]
    latest = run_dir / METRICS_FILE
    return [path for _, path in sorted(earlier)] + ([latest] if latest.is_file() else [])


def read_history(files: Iterable[Path]) -> dict[str, list[Point]]:
    """Read the metrics of a run from its parts.

    A part that starts at a step which an earlier part had already passed (a fit resumed from a
    checkpoint that was not the last) takes the place of what came after that step.

    Args:
        files: The CSV files, oldest first. Cells that hold no number, as in a line that was cut
            short, are passed over.
    """
    points: dict[str, dict[int, Point]] = {}
    for file in files:
        part = _read_part(file)
        start = min((min(found) for found in part.values()), default=None)
        if start is None:
            continue
        for name, found in points.items():
            points[name] = {step: point for step, point in found.items() if step < start}
        for name, found in part.items():
            points.setdefault(name, {}).update(found)
    return {
        name: [found[step] for step in sorted(found)] for name, found in points.items() if found
    }


def stage_of(name: str) -> tuple[str, str]:
    """Split a metric's name into what it was computed on, and what it is.

    >>> stage_of("val/accuracy"), stage_of("train_loss"), stage_of("lr-AdamW")
    (('val', 'accuracy'), ('train', 'loss'), ('', 'lr-AdamW'))
    """
    match = _STAGE.fullmatch(name)
    if match is None:
        return "", name
    return ("train" if match[1] == "train" else "val"), match[2]


def best_point(points: Iterable[Point], mode: str) -> Point | None:
    """Return the first of the best points, the one whose checkpoint is kept.

    Args:
        points: A metric's points.
        mode: `"max"` or `"min"`.
    """
    numbers = [point for point in points if not math.isnan(point.value)]
    if not numbers:
        return None
    return (max if mode == "max" else min)(numbers, key=lambda point: point.value)


def value_at(points: Iterable[Point], step: int) -> float | None:
    """Return a metric's latest value at a step, or None before its first."""
    earlier = [point.value for point in points if point.step <= step]
    return earlier[-1] if earlier else None


def _read_part(file: Path) -> dict[str, dict[int, Point]]:
    part: dict[str, dict[int, Point]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            # The logger counts steps and epochs from 0: the row of step 0 tells of the first step.
            done, epoch = _count(row.pop("step", None)), _count(row.pop("epoch", None))
            if done is None:
                continue
            for name, cell in row.items():
                value = _number(cell) if name is not None else None
                if value is not None:
                    part.setdefault(name, {})[done] = Point(done, epoch, value)
    return part


def _count(cell: str | None) -> int | None:
    number = _number(cell)
    return None if number is None or not math.isfinite(number) else int(number) + 1


def _number(cell: str | None) -> float | None:
    try:
        return float(cell or "")
    except ValueError:
        return None
