"""The figures: what is drawn, and that it can be read."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import figures
from lightning_lora.figures import draw_curves
from lightning_lora.history import Point


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, the latest last."""
    kept: list[Any] = []
    save = figures.save

    def keep(figure: Any, path: str | Path) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr("lightning_lora.figures.save", keep)
    return kept


def size_of_image(path: Path) -> tuple[int, int]:
    """Width and height as the header of a PNG file says."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _run(epochs: int = 6) -> dict[str, list[Point]]:
    steps = range(10, 60 * epochs + 1, 10)
    ends = [(60 * epoch, epoch) for epoch in range(1, epochs + 1)]
    rate = [Point(step, None, 1e-3 * (1 - step / 400)) for step in steps]
    return {
        "train/loss": [
            Point(step, 1 + step // 60, math.exp(-step / 90) + 0.1 * (step % 3)) for step in steps
        ],
        "val/loss": [Point(step, epoch, math.exp(-epoch / 2)) for step, epoch in ends],
        "val/accuracy": [Point(step, epoch, 0.9 - abs(epoch - 4) / 10) for step, epoch in ends],
        "val/f1": [Point(step, epoch, 0.5) for step, epoch in ends],
        "lr-AdamW/pg1": rate,
        "lr-AdamW/pg2": list(rate),
    }


def _legend(axis: Any) -> list[str]:
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_loss_metrics_and_rate_are_drawn_over_the_steps(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "curves.png"
    assert draw_curves(_run(), path, "outputs/run/version_0", "val/accuracy", "max")
    assert [found.name for found in path.parent.iterdir()] == ["curves.png"]
    width, height = size_of_image(path)
    assert 900 < width < 2000 and 900 < height < 2000
    loss, scores, rate = drawn[-1].axes
    assert drawn[-1].get_suptitle() == "outputs/run/version_0"
    assert [axis.get_ylabel() for axis in drawn[-1].axes] == ["loss", "score", "learning rate"]
    assert rate.get_xlabel() == "optimizer steps"
    assert _legend(loss) == ["train/loss\n(and its running mean)", "val/loss"]
    assert _legend(scores) == [
        "val/accuracy",
        "val/f1",
        "best val/accuracy:\n0.9 (epoch 4, step 240)",
    ]
    assert list(scores.lines[0].get_xdata()) == [60, 120, 180, 240, 300, 360]
    assert len(rate.lines) == 1, "equal rates are one line"
    assert rate.get_ylim()[0] == 0


def test_nothing_covers_anything(tmp_path: Path, drawn: list[Any]) -> None:
    history = _run() | {
        f"val/{name}": [Point(60 * epoch, epoch, 10.0 * epoch + place) for epoch in range(1, 7)]
        for place, name in enumerate(["exact_match", "has_answer_exact_match", "no_answer_f1"])
    }
    draw_curves(history, tmp_path / "curves.png", "a title", "val/accuracy", "max")
    figure = drawn[-1]
    renderer = figure.canvas.get_renderer()
    boxes = [axis.get_window_extent(renderer) for axis in figure.axes]
    boxes += [axis.title.get_window_extent(renderer) for axis in figure.axes]
    boxes += [axis._left_title.get_window_extent(renderer) for axis in figure.axes]
    boxes += [a.get_legend().get_window_extent(renderer) for a in figure.axes if a.get_legend()]
    boxes.append(figure._suptitle.get_window_extent(renderer))
    boxes = [box.shrunk(0.98, 0.98) for box in boxes if box.width and box.height]
    assert len(boxes) == 4 + 4 + 3 + 1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_lines_are_told_apart_without_colours(tmp_path: Path, drawn: list[Any]) -> None:
    history = {f"val/{name}": [Point(1, 1, 0.1), Point(2, 2, 0.2)] for name in "abcdefghij"}
    draw_curves(history, tmp_path / "curves.png", "t")
    lines = drawn[-1].axes[0].lines
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == 10
    assert len({(marker, style) for _, marker, style in looks}) == 10


def test_values_of_other_sizes_have_diagrams_of_their_own(tmp_path: Path, drawn: list[Any]) -> None:
    history = {
        f"val/{name}": [Point(1, 1, value), Point(2, 2, value / 2)]
        for name, value in {
            "f1": 0.9,
            "matthews": -0.2,
            "bleu": 40,
            "perplexity": 9,
            "n": 5e4,
        }.items()
    }
    draw_curves(history, tmp_path / "curves.png", "t")
    shown = {axis.get_ylabel(): _legend(axis) for axis in drawn[-1].axes}
    assert shown == {
        "n": ["val/n"],
        "perplexity": ["val/perplexity"],
        "score": ["val/f1", "val/matthews"],
        "score (percent)": ["val/bleu"],
    }


def test_a_run_without_validation_has_loss_and_rate(tmp_path: Path, drawn: list[Any]) -> None:
    history = {name: points for name, points in _run().items() if not name.startswith("val")}
    assert draw_curves(history, tmp_path / "curves.png", "t", "val/accuracy", "max")
    assert [axis.get_ylabel() for axis in drawn[-1].axes] == ["loss", "learning rate"]


def test_a_single_point_is_seen_at_a_whole_step(tmp_path: Path, drawn: list[Any]) -> None:
    assert draw_curves({"train/loss": [Point(7, 1, 2.5)]}, tmp_path / "curves.png", "t")
    (axis,) = drawn[-1].axes
    assert axis.lines[0].get_marker() == "o"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["6", "7", "8"]


def test_gaps_stay_gaps(tmp_path: Path, drawn: list[Any]) -> None:
    values = [0.5, math.nan, 0.7, math.inf, 0.8]
    history = {"val/f1": [Point(step, step, value) for step, value in enumerate(values, start=1)]}
    history["train/loss"] = [
        Point(step, 1, math.nan if step == 9 else 1.0) for step in range(1, 50)
    ]
    assert draw_curves(history, tmp_path / "curves.png", "t", "val/f1", "max")
    loss, scores = drawn[-1].axes
    assert [math.isnan(value) for value in scores.lines[0].get_ydata()] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert [math.isnan(value) for value in loss.lines[1].get_ydata()].index(True) == 8
    assert draw_curves({"val/f1": [Point(1, 1, math.nan)]}, tmp_path / "nan.png", "t", "val/f1")


def test_a_running_mean_follows_the_level_to_the_ends(tmp_path: Path, drawn: list[Any]) -> None:
    noisy = [Point(step, 1, 1.0 + (0.5 if step % 2 else -0.5)) for step in range(1, 101)]
    draw_curves({"train/loss": noisy}, tmp_path / "curves.png", "t")
    mean = drawn[-1].axes[0].lines[1].get_ydata()
    assert max(abs(value - 1.0) for value in mean) < 0.2


def test_without_points_nothing_is_written(tmp_path: Path) -> None:
    assert not draw_curves({}, tmp_path / "curves.png", "t")
    assert not draw_curves({"epoch_time": [Point(1, 1, 2.0)]}, tmp_path / "curves.png", "t")
    assert not list(tmp_path.iterdir())


def test_names_are_no_formulas(tmp_path: Path, drawn: list[Any]) -> None:
    history = {"val/$\\frac$": [Point(1, 1, 0.5)], "val/b": [Point(1, 1, 0.4)]}
    assert draw_curves(history, tmp_path / "curves.png", "runs/$\\x$", "val/$\\frac$", "max")


def test_a_failure_leaves_the_figure_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curves.png").write_bytes(b"old")

    def fail(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(_run(), tmp_path / "curves.png", "t")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("curves.png", b"old")]


def test_figures_of_the_callers_are_left_alone(tmp_path: Path) -> None:
    from matplotlib import get_backend, pyplot

    before = (get_backend(), pyplot.get_fignums())
    draw_curves(_run(), tmp_path / "curves.png", "t")
    assert (get_backend(), pyplot.get_fignums()) == before


def test_matplotlib_is_imported_by_drawing_alone() -> None:
    modules = "lightning_lora.figures, lightning_lora.confusion, lightning_lora.reporting"
    program = f"import sys, {modules}; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False False\n"
