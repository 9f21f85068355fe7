"""The curves of a run as a PNG file.

Matplotlib is imported when a figure is drawn, and used without pyplot, so that neither the backend
nor the figures of the caller's are touched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_lora.files import replacing_file
from lightning_lora.history import History, Point, best_point, stage_of

DPI = 150
# Okabe and Ito's colours, which people who see colours differently tell apart; their yellow is too
# light for a line and marks the best value.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
YELLOW = "#F0E442"
MARKERS = "osD^vPX"
_RATE = "Learning rate"
_SMOOTHED_FROM = 30
_MARKED_UP_TO = 40


@dataclass(frozen=True)
class _Panel:
    """One diagram of a figure: the points of each line by its label, and what they count."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[Point]]


def draw_curves(
    history: History,
    path: str | Path,
    title: str,
    monitor: str | None = None,
    mode: str = "min",
) -> bool:
    """Draw loss, validation metrics and learning rate over the optimizer steps of a run.

    Args:
        history: The course of the run, as of `read_history`. Values that are no finite numbers
            leave gaps.
        path: The PNG file, which appears when it is complete.
        title: Stands above the diagrams.
        monitor: The metric that the best checkpoint is chosen by; its best value is marked.
        mode: `"max"` or `"min"`: which value is the best.

    Returns:
        Whether there was anything to draw; without it no file is written.
    """
    panels = _panels(history, monitor)
    if not panels:
        return False
    best = best_point(history.get(monitor or "", ()), mode)
    figure = new_figure(9.5, 0.8 + 2.4 * len(panels), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, (label, points) in enumerate(panel.lines.items()):
            _draw_line(axis, label, points, number)
        if best is not None and monitor in panel.lines:
            _mark(axis, best, f"best {monitor}:\n{best.value:.4g} ({best.when()})")
        _label(axis, panel)
    _count_steps(axes[-1])
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    save(figure, path)
    return True


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Any:
    """Return a figure of that many inches.

    Args:
        width: In inches.
        height: In inches.
        layout: `"constrained"` where its parts shall make room for each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG file that appears when it is complete."""
    with replacing_file(path) as fresh, warnings.catch_warnings():
        # Letters that the font lacks become boxes, and nobody can do anything about it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(fresh, format="png", bbox_inches="tight", pad_inches=0.15)


def _panels(history: History, monitor: str | None) -> list[_Panel]:
    losses: dict[str, Sequence[Point]] = {}
    rates: dict[str, Sequence[Point]] = {}
    scores: dict[str, dict[str, Sequence[Point]]] = {}
    for name in sorted(history, key=lambda name: (name != monitor, name)):
        stage, what = stage_of(name)
        if name.startswith("lr-"):
            rates[name.removeprefix("lr-")] = history[name]
        elif stage and "loss" in what:
            losses[name] = history[name]
        elif stage == "val":
            scores.setdefault(_scale(what, history[name]), {})[name] = history[name]
    panels = [_Panel("Loss", "loss", losses)]
    panels += [_Panel("Validation", unit, scores[unit]) for unit in sorted(scores)]
    panels.append(_Panel(_RATE, "learning rate", _distinct(rates)))
    return [panel for panel in panels if panel.lines]


def _scale(what: str, points: Sequence[Point]) -> str:
    """Name the vertical axis of a metric: values of another kind or size would press it flat."""
    for own in ("perplexity", "threshold"):
        if own in what:
            return own
    largest = max((abs(p.value) for p in points if math.isfinite(p.value)), default=0.0)
    return "score" if largest <= 1 else "score (percent)" if largest <= 100 else what


def _distinct(rates: Mapping[str, Sequence[Point]]) -> dict[str, Sequence[Point]]:
    """Draw one line for parameter groups whose rates are the same."""
    names: dict[tuple[Point, ...], list[str]] = {}
    for name, points in rates.items():
        names.setdefault(tuple(points), []).append(name)
    return {", ".join(group): points for points, group in names.items()}


def _draw_line(axis: Any, label: str, points: Sequence[Point], number: int) -> None:
    steps = [point.step for point in points]
    values = [point.value if math.isfinite(point.value) else math.nan for point in points]
    colour = COLOURS[number % len(COLOURS)]
    # The first is the one that is chosen by, and lies above the others.
    style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "label": label}
    style["zorder"] = 3 - number / 100
    if number >= len(COLOURS):
        style["linestyle"] = "--"
    if len(points) <= _MARKED_UP_TO:
        # A value alone between gaps is no line and shows by its marker only.
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}
    if label.startswith("train") and len(points) >= _SMOOTHED_FROM:
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values = _running_mean(values, width=max(5, len(values) // 20))
        style |= {"marker": "", "label": f"{label}\n(and its running mean)"}
    axis.plot(steps, values, **style)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean around each value; gaps stay gaps."""
    means = []
    for place, value in enumerate(values):
        window = values[max(0, place - width // 2) : place + width // 2 + 1]
        around = [v for v in window if not math.isnan(v)]
        means.append(math.nan if math.isnan(value) else sum(around) / len(around))
    return means


def _mark(axis: Any, point: Point, label: str) -> None:
    axis.plot(
        point.step,
        point.value,
        linestyle="",
        marker="*",
        markersize=14,
        markerfacecolor=YELLOW,
        markeredgecolor="black",
        zorder=5,
        label=label,
    )


def _label(axis: Any, panel: _Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    dress_axis(axis, panel.title)
    axis.set_ylabel(panel.unit)
    # Matplotlib's own way of writing small numbers puts a power of ten where the title is.
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.title == _RATE:
        axis.set_ylim(bottom=0)
    _, labels = axis.get_legend_handles_labels()
    if len(labels) > 1 or panel.title != _RATE:
        legend_beside(axis)


def dress_axis(axis: Any, title: str) -> None:
    """Give a diagram its title, a grid behind what is drawn, and no frame above and right."""
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(True, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend_beside(axis: Any) -> None:
    """Put the legend beside the diagram, where it covers no line."""
    # Given its handles, a legend of nothing is no reason for a warning.
    handles, labels = axis.get_legend_handles_labels()
    legend = axis.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _count_steps(axis: Any) -> None:
    """Number the horizontal axis, which all diagrams share, in whole steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axis.get_xlim()
    if high - low < 2:
        axis.set_xlim(round(low) - 1, round(high) + 1)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("optimizer steps")
