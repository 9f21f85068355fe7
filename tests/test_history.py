"""The course of a run, read from the files of Lightning's CSV logger."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_lora.history import (
    Point,
    best_point,
    metrics_files,
    read_history,
    stage_of,
    value_at,
)

HEADER = "epoch,lr-AdamW,step,train/loss,val/f1\n"


def _write(folder: Path, name: str, rows: str) -> Path:
    path = folder / name
    path.write_text(HEADER + rows)
    return path


def test_rows_become_points_of_steps_done_and_epochs_from_one(tmp_path: Path) -> None:
    file = _write(tmp_path, "metrics.csv", ",0.5,9,,\n0,,9,1.5,\n0,,31,,0.25\n1,,63,,nan\n")
    history = read_history([file])
    assert history["train/loss"] == [Point(10, 1, 1.5)]
    assert history["lr-AdamW"] == [Point(10, None, 0.5)]
    assert history["val/f1"][0] == Point(32, 1, 0.25)
    assert math.isnan(history["val/f1"][1].value)
    assert set(history) == {"train/loss", "lr-AdamW", "val/f1"}


def test_what_a_logger_writes_is_counted_as_the_trainer_counts(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import CSVLogger

    class Model(BoringModel):
        def training_step(self, batch: object, batch_idx: int) -> object:
            self.log("train/loss", 1.0)
            return super().training_step(batch, batch_idx)  # type: ignore[arg-type]

        def on_validation_epoch_end(self) -> None:
            assert isinstance(self, LightningModule)
            self.log("val/step", float(self.trainer.global_step))

    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=6,
        limit_val_batches=1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, name="", version="a"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Model())
    history = read_history(metrics_files(tmp_path / "a"))
    assert history["val/step"] == [Point(3, 1, 3.0), Point(6, 2, 6.0)]
    assert [point.step for point in history["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_the_parts_of_a_resumed_run_are_put_together_in_their_order(tmp_path: Path) -> None:
    _write(tmp_path, "metrics_2.csv", "1,,19,2.0,\n")
    _write(tmp_path, "metrics_10.csv", "2,,29,3.0,\n")
    _write(tmp_path, "metrics_1.csv", "0,,9,1.0,\n")
    _write(tmp_path, "metrics.csv", "3,,39,4.0,\n")
    _write(tmp_path, "metrics_old.csv", "9,,99,9.0,\n")
    files = metrics_files(tmp_path)
    assert [file.name for file in files] == [
        "metrics_1.csv",
        "metrics_2.csv",
        "metrics_10.csv",
        "metrics.csv",
    ]
    assert [point.value for point in read_history(files)["train/loss"]] == [1, 2, 3, 4]
    assert metrics_files(tmp_path / "nowhere") == []


def test_a_later_part_replaces_what_came_after_the_step_it_starts_at(tmp_path: Path) -> None:
    first = _write(tmp_path, "metrics_1.csv", "0,,9,1.0,\n0,,19,2.0,\n1,,29,3.0,\n1,,30,,0.5\n")
    later = _write(tmp_path, "metrics.csv", "0,,19,7.0,\n")
    history = read_history([first, later])
    assert [(p.step, p.value) for p in history["train/loss"]] == [(10, 1.0), (20, 7.0)]
    assert "val/f1" not in history


def test_lines_that_were_cut_short_are_passed_over(tmp_path: Path) -> None:
    file = _write(tmp_path, "metrics.csv", "0,,9,1.0,\n,,,5.0,\n0,,19,2.0,0.5,extra\n1,,29\n1,,x,3")
    history = read_history([file])
    assert [point.value for point in history["train/loss"]] == [1.0, 2.0]
    (tmp_path / "empty.csv").touch()
    assert read_history([tmp_path / "empty.csv"]) == {}


def test_the_best_point_is_the_first_of_the_best() -> None:
    points = [Point(1, 1, math.nan), Point(2, 2, 0.5), Point(3, 3, 0.9), Point(4, 4, 0.9)]
    assert best_point(points, "max") == points[2]
    assert best_point(points, "min") == points[1]
    assert best_point(points[:1], "max") is None


def test_values_at_a_step_are_the_latest_by_then() -> None:
    points = [Point(2, 1, 0.5), Point(4, 2, 0.7)]
    assert [value_at(points, step) for step in (1, 2, 3, 4, 9)] == [None, 0.5, 0.5, 0.7, 0.7]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/loss", ("val", "loss")),
        ("valid_f1", ("val", "f1")),
        ("val_mismatched/accuracy", ("val", "mismatched/accuracy")),
        ("train/loss", ("train", "loss")),
        ("validity", ("", "validity")),
    ],
)
def test_names_tell_what_a_metric_was_computed_on(name: str, expected: tuple[str, str]) -> None:
    assert stage_of(name) == expected
