"""What a command leaves behind when it ends: its figures, its scores and the list of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.callback import LoRACallback
from lightning_lora.cli_defaults import scores
from lightning_lora.cli_paths import CONFIG_FILE
from lightning_lora.comparison import validate_merged
from lightning_lora.confusion import MOST_CLASSES, draw_confusion_matrix
from lightning_lora.figures import draw_curves
from lightning_lora.history import METRICS_FILE, Point, metrics_files, read_history
from lightning_lora.reporting import Scores, fit_scores

CURVES = "curves.png"
CONFUSION = "confusion_matrix.png"
TEST_CONFUSION = "confusion_matrix_test.png"

_Result = TypeVar("_Result")


class KeepConfusion(Callback):
    """Keeps the confusion matrix of the best validation, and of the last.

    The model's own is that of its last evaluation; the best checkpoint is an earlier one as a rule.
    What is kept goes into the checkpoints, for a fit that is resumed.

    Attributes:
        best: When the best validation was, with its score, and its counts `[C, C]`.
        last: The same of the last validation.
    """

    def __init__(self) -> None:
        self.best: tuple[Point, torch.Tensor] | None = None
        self.last: tuple[Point, torch.Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the counts of the validation that has just ended."""
        counts = confusion_of(pl_module, "val")
        if counts is None or trainer.sanity_checking:
            return
        monitor, mode = monitored(trainer)
        score = float(trainer.callback_metrics.get(monitor or "", torch.nan))
        self.last = (Point(trainer.global_step, trainer.current_epoch + 1, score), counts)
        sign = 1 if mode == "max" else -1
        if score == score and (self.best is None or sign * score > sign * self.best[0].value):
            self.best = self.last

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, as tensors and primitives."""
        return {
            name: {"step": p.step, "epoch": p.epoch, "value": p.value, "counts": counts}
            for name in ("best", "last")
            for p, counts in filter(None, [getattr(self, name)])
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what an earlier part of the fit has kept."""
        for name, kept in state_dict.items():
            point = Point(kept["step"], kept["epoch"], kept["value"])
            setattr(self, name, (point, kept["counts"]))


@dataclass
class Closing:
    """What a fit has to show.

    Attributes:
        scores: Its metrics.
        files: What it has written, by what it is.
        checkpoint: The best checkpoint, or the last where none is the best.
    """

    scores: Scores
    files: dict[str, Path]
    checkpoint: Path | None


def close_fit(trainer: Trainer, model: Any, run_dir: Path, log_dir: str | None) -> Closing:
    """Draw the figures of a fit that has ended, and gather what it has written.

    Args:
        trainer: The trainer that has fitted.
        model: The LightningModule.
        run_dir: The run's folder, where the figures are written.
        log_dir: The trainer's folder of logs.
    """
    files: dict[str, Path] = {}
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint):
            # Without a metric to choose by, Lightning calls the newest the best.
            kind = "best" if checkpoint.monitor else "last"
            named = ((kind, checkpoint.best_model_path), ("last", checkpoint.last_model_path))
            for name, path in named:
                if path:
                    files[f"{name} checkpoint (adapter)"] = Path(path)
    chosen = next(iter(files.values()), None)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LoRACallback):
            files |= callback.exported
    monitor, mode = monitored(trainer)
    history = _attempt("The run's metrics could not be read", lambda: _history(trainer)) or {}
    curves, confusion = run_dir / CURVES, run_dir / CONFUSION
    _attempt(
        "The curves could not be drawn",
        lambda: draw_curves(history, curves, str(run_dir), monitor, mode),
    )
    _attempt(
        "The confusion matrix could not be drawn",
        lambda: _draw_validation(trainer, model, confusion),
    )
    files |= {"curves": curves, "confusion matrix": confusion}
    if log_dir is not None:
        files |= {"logs": Path(log_dir) / METRICS_FILE, "config": Path(log_dir) / CONFIG_FILE}
    return Closing(fit_scores(history, monitor, mode, scores(trainer)), files, chosen)


def merge_scores(trainer: Trainer, model: Any, data: Any) -> dict[str, dict[str, float]]:
    """Score what a fit has merged into a quantized base, beside the same factors unmerged.

    Every rank has to call this.

    Args:
        trainer: The trainer that has fitted.
        model: The LightningModule.
        data: The data module, if there is one.

    Returns:
        Columns of the table of scores; none for a base that is not quantized, whose merge rounds
        and no more.
    """
    reports = (c.merge_report for c in trainer.callbacks if isinstance(c, LoRACallback))  # type: ignore[attr-defined]
    report = next(reports, None)
    validates = trainer.num_val_batches and sum(trainer.num_val_batches) > 0
    if report is None or not report.errors or not validates or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {}
    found = validate_merged(trainer, model, datamodule=data)
    merged = f"merged\n({report.base})"
    return {"unmerged\n(as trained)": found["unmerged"], merged: found["merged"]}


def close_test(model: Any, run_dir: Path, checkpoint: Path | None) -> dict[str, Path]:
    """Draw the figures of a test that has ended, and return them by what they are.

    Args:
        model: The LightningModule.
        run_dir: Where the figures are written.
        checkpoint: The checkpoint that was tested.
    """
    counts = confusion_of(model, "test")
    path = run_dir / TEST_CONFUSION
    if counts is None:
        return {}
    title = "Test" if checkpoint is None else f"Test\n{checkpoint}"
    _attempt(
        "The confusion matrix could not be drawn",
        lambda: draw_confusion_matrix(counts, model.class_names, path, title),
    )
    return {"confusion matrix": path}


def confusion_of(model: Any, stage: str) -> torch.Tensor | None:
    """Return the int32 counts `[C, C]` of a model's last evaluation, where there are any.

    Args:
        model: The LightningModule; it may have an attribute `confusion`.
        stage: `"val"` or `"test"`.
    """
    confusion = getattr(model, "confusion", None)
    counts = confusion.get(stage) if isinstance(confusion, dict) else None
    if counts is None or len(counts) > MOST_CLASSES:
        return None
    return counts.detach().to("cpu", torch.int32, copy=True)


def monitored(trainer: Trainer) -> tuple[str | None, str]:
    """Return the metric that the best checkpoint is chosen by, and whether `max` or `min` is."""
    checkpoint = trainer.checkpoint_callback
    if isinstance(checkpoint, ModelCheckpoint):
        return checkpoint.monitor, checkpoint.mode
    return None, "min"


def _history(trainer: Trainer) -> dict[str, list[Point]]:
    logs = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return read_history(metrics_files(logs[0])) if logs else {}


def _draw_validation(trainer: Trainer, model: Any, path: Path) -> None:
    keepers = (c for c in trainer.callbacks if isinstance(c, KeepConfusion))  # type: ignore[attr-defined]
    keeper = next(keepers, None)
    if keeper is None or keeper.last is None:
        return
    (point, counts), which = keeper.last, "last validation"
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)
    # Otherwise the best checkpoint is of a validation that was not seen here.
    if best is not None and keeper.best is not None and keeper.best[0].value == float(best):
        (point, counts), which = keeper.best, "best checkpoint"
    title = f"Validation, {which} ({point.when()})"
    draw_confusion_matrix(counts, model.class_names, path, title)


def _attempt(failure: str, action: Callable[[], _Result]) -> _Result | None:
    """Carry out what must not cost a command its results when it fails."""
    try:
        return action()
    except Exception as error:
        rank_zero_warn(f"{failure}: {type(error).__name__}: {error}")
        return None
