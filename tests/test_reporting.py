"""The closing block: which values its table shows, and that it is readable as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.history import Point
from lightning_lora.reporting import Scores, Summary, fit_scores, print_summary, readable_numbers

HISTORY = {
    "train/loss": [Point(5, 1, 0.9), Point(25, 3, 0.1)],
    "val/accuracy": [Point(10, 1, 0.5), Point(20, 2, 0.875), Point(30, 3, 0.75)],
    "val/loss": [Point(10, 1, 1.0), Point(20, 2, 0.5), Point(30, 3, 0.75)],
    "lr-AdamW": [Point(5, None, 1e-3)],
}


def test_the_best_evaluation_stands_beside_the_last() -> None:
    table = fit_scores(HISTORY, "val/accuracy", "max", {"lr": 0.1})
    assert table.columns == {
        "best by val/accuracy\nepoch 2, step 20": {"val/accuracy": 0.875, "val/loss": 0.5},
        "last\nepoch 3, step 30": {"val/accuracy": 0.75, "val/loss": 0.75},
    }
    lowest = fit_scores(HISTORY, "val/loss", "min", {})
    assert next(iter(lowest.columns)) == "best by val/loss\nepoch 2, step 20"


@pytest.mark.parametrize("monitor", [None, "val/other"])
def test_without_a_metric_to_choose_by_there_is_the_last_alone(monitor: str | None) -> None:
    table = fit_scores(HISTORY, monitor, "max", {})
    assert list(table.columns) == ["last\nepoch 3, step 30"]


def test_without_a_validation_the_latest_metrics_are_shown() -> None:
    history = {"train/loss": HISTORY["train/loss"]}
    assert fit_scores(history, None, "min", {"train/loss": 0.25}).columns == {
        "last": {"train/loss": 0.25}
    }


def test_the_block_is_a_table_with_the_chosen_metric_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "curves.png").write_bytes(b"12345")
    files = {"curves": tmp_path / "curves.png", "gone": tmp_path / "gone.png"}
    history = {**HISTORY, "val/[odd]": [Point(30, 3, 5.0)]}
    print_summary(
        Summary("fit [run]", fit_scores(history, "val/loss", "min", {}), files, [("Next", "do it")])
    )
    printed = capsys.readouterr().out
    rows = [line.strip("│ ").split() for line in printed.splitlines()]
    assert "fit [run]" in printed
    assert rows[2] == ["metric", "epoch", "2,", "step", "20", "epoch", "3,", "step", "30"]
    assert rows[4:7] == [
        ["val/loss", "0.5000", "0.7500"],
        ["val/[odd]", "-", "5.0000"],
        ["val/accuracy", "0.8750", "0.7500"],
    ]
    assert "5 B" in printed
    assert "gone.png" not in printed


def test_a_block_without_scores_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Summary("predict", Scores({"value": {}})))
    assert "metric" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([0.92754, 0.5], ["0.9275", "0.5000"]),
        ([79.4321, 8.0], ["79.43", "8.00"]),
        ([812.34, None], ["812.34", "-"]),
        ([12345.6], ["12,346"]),
        ([0.00012345, 0.0], ["0.000123", "0"]),
        ([float("nan"), -0.5], ["nan", "-0.5000"]),
        ([float("inf")], ["inf"]),
    ],
)
def test_values_of_a_metric_have_as_many_decimals(
    values: list[float | None], written: list[str]
) -> None:
    assert readable_numbers(values) == written
