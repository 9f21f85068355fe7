"""What the runs of a sweep have come to: read, gathered over seeds, written and drawn."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.cli_paths import CHECKPOINTS
from lightning_lora.figures import COLOURS, MARKERS, new_figure, save
from lightning_lora.files import replacing_file
from lightning_lora.history import best_point, metrics_files, read_history, stage_of, value_at
from lightning_lora.sweep import LORA, Result, Run

TABLE, RECORDS, SUMMARY, FIGURE = "sweep.csv", "sweep.json", "sweep.md", "sweep.png"
_MODE = re.compile(r"'mode': '(max|min)'")


@dataclass(frozen=True)
class Row:
    """The runs that differ in their seed alone.

    Attributes:
        method: `"lora"` or the name of a baseline.
        settings: Their values of the keys that vary.
        trained: How many parameters they train.
        scores: Their scores by seed.
        mean: The mean of the scores; `None` where all runs have failed.
        deviation: Their sample standard deviation; `None` of fewer than two.
        seconds: The median time of a fit.
        errors: What went wrong, by seed.
    """

    method: str
    settings: Mapping[str, str]
    trained: int
    scores: Mapping[int, float]
    mean: float | None
    deviation: float | None
    seconds: float
    errors: Mapping[int, str]


def read_result(run: Run, folder: Path, seconds: float) -> Result:
    """The result of a fit that has ended.

    Args:
        run: The run.
        folder: The folder of the fit, with its logs and checkpoints.
        seconds: How long it took.
    """
    checkpoints = folder / CHECKPOINTS
    best = next(p for p in (checkpoints / "best.ckpt", checkpoints / "last.ckpt") if p.is_file())
    checkpoint = read_checkpoint(best)
    trained = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    history = read_history(metrics_files(folder))
    metric, mode = _monitored(checkpoint)
    found = best_point(history.get(metric, ()), mode)
    scores = {}
    if found is not None:
        at_step = {
            k: value_at(v, found.step) for k, v in history.items() if stage_of(k)[0] == "val"
        }
        scores = {name: value for name, value in at_step.items() if value is not None}
    return Result(
        run.method,
        dict(run.settings),
        run.seed,
        metric,
        mode,
        None if found is None else found.value,
        scores,
        trained,
        round(seconds, 1),
        None if found is not None else f"the fit has logged no {metric or 'metric to compare by'}",
    )


def gather(results: Sequence[Result]) -> list[Row]:
    """Results with those of several seeds in one row, in the order of the grid."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, tuple(result.settings.items())), []).append(result)
    rows = []
    for (method, settings), found in groups.items():
        scores = {r.seed: r.score for r in found if r.score is not None and r.error is None}
        values = list(scores.values())
        rows.append(
            Row(
                method,
                dict(settings),
                max(result.trained for result in found),
                scores,
                statistics.mean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                statistics.median(result.seconds for result in found),
                {r.seed: r.error for r in found if r.error is not None},
            )
        )
    return rows


def write_sweep(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write `sweep.csv` (a line a run), `sweep.json`, `sweep.md` (a row for each setting) and
    `sweep.png` (the score over the trained parameters).

    Args:
        results: At least one.
        folder: The folder of the sweep.

    Returns:
        The files.
    """
    rows = gather(results)
    metric = next((result.metric for result in results if result.metric), "score")
    texts = {
        TABLE: _as_csv(results),
        RECORDS: json.dumps(as_json(results), indent=2) + "\n",
        SUMMARY: as_markdown(rows, metric),
    }
    for name, text in texts.items():
        with replacing_file(folder / name) as fresh:
            fresh.write_text(text, encoding="utf-8")
    written = [folder / name for name in texts]
    if any(row.mean is not None for row in rows):
        draw_sweep(rows, metric, folder / FIGURE)
        written.append(folder / FIGURE)
    return written


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that is known, in primitives."""
    return {
        "rows": [asdict(row) for row in gather(results)],
        "runs": [asdict(result) for result in results],
    }


def table_of(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of a sweep."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    columns = ["method", *(key.removeprefix("lora.") for key in keys), "trained", metric]
    columns += ["std", "seeds", "seconds"]
    cells = []
    for row in rows:
        score = "failed" if row.mean is None else f"{row.mean:.4g}"
        deviation = "-" if row.deviation is None else f"{row.deviation:.2g}"
        cells.append(
            [
                row.method,
                *(row.settings.get(key, "-") for key in keys),
                f"{row.trained:,}",
                score,
                deviation,
                str(len(row.scores)),
                f"{row.seconds:.0f}",
            ]
        )
    return columns, cells


def as_markdown(rows: Sequence[Row], metric: str) -> str:
    """The table in Markdown, and what went wrong."""
    columns, cells = table_of(rows, metric)
    lines = [columns, ["---"] * len(columns), *cells]
    text = "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in x)} |" for x in lines)
    errors = [
        f"- {row.method} {dict(row.settings)}, seed {seed}: {error}"
        for row in rows
        for seed, error in row.errors.items()
    ]
    return text + "\n" + ("\nFailed:\n\n" + "\n".join(errors) + "\n" if errors else "")


def draw_sweep(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draw the mean score over the trained parameters: a line for each choice of the other
    settings than the rank, and a mark for each baseline. Bars are standard deviations over seeds.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.mean is not None:
            groups.setdefault(_group(row), []).append(row)
    figure = new_figure(9, 5.5, layout="constrained")
    axis = figure.subplots()
    for number, (label, found) in enumerate(groups.items()):
        ordered = sorted(found, key=lambda row: row.trained)
        is_lora = found[0].method == LORA
        axis.errorbar(
            [row.trained for row in ordered],
            [row.mean for row in ordered],
            yerr=[row.deviation or 0 for row in ordered],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if is_lora and len(ordered) > 1 else "none",
            markersize=6 if is_lora else 9,
            capsize=3,
            linewidth=1.4,
            elinewidth=0.8,
            label=label,
        )
        for row in ordered if is_lora else ():
            if rank := row.settings.get("lora.r"):
                axis.annotate(
                    f"r={rank}",
                    (row.trained, row.mean),
                    (4, 5),
                    textcoords="offset points",
                    fontsize=7,
                    parse_math=False,
                )
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel(metric, parse_math=False)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    title = "Score over trained parameters"
    if any(row.deviation is not None for row in rows):
        title += " (mean and standard deviation over seeds)"
    axis.set_title(title, fontsize=11, fontweight="bold")
    save(figure, path)


def _group(row: Row) -> str:
    others = {key: value for key, value in row.settings.items() if key != "lora.r"}
    if row.method != LORA and not others:
        return row.method
    shown = (f"{key.rpartition('.')[-1]}={value}" for key, value in others.items())
    return " ".join(["LoRA" if row.method == LORA else row.method, *shown])


def _monitored(checkpoint: Mapping[str, Any]) -> tuple[str, str]:
    """The metric that the best checkpoint is chosen by, and whether `max` or `min` is best."""
    for key, state in checkpoint.get("callbacks", {}).items():
        mode = _MODE.search(key)
        if key.startswith("ModelCheckpoint") and mode and state.get("monitor"):
            return str(state["monitor"]), mode[1]
    return "val/loss", "min"


def _as_csv(results: Sequence[Result]) -> str:
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    metrics = list(dict.fromkeys(name for result in results for name in result.scores))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", *keys, "seed", "trained", *metrics, "seconds", "error"])
    for result in results:
        writer.writerow(
            [
                result.method,
                *(result.settings.get(key, "") for key in keys),
                result.seed,
                result.trained,
                *(result.scores.get(name, "") for name in metrics),
                result.seconds,
                result.error or "",
            ]
        )
    return stream.getvalue()
