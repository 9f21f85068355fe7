"""What the command line adds to a trainer that the config says nothing about."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.imports import RequirementCache
from typing_extensions import override

from lightning_lora.callback import LoRACallback
from lightning_lora.cli_paths import CHECKPOINTS, CONFIG_FILE, LAST
from lightning_lora.history import METRICS_FILE, metrics_files


class EpochLines(Callback):
    """Prints one line an epoch, for output that goes to a file and not to a terminal."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's metrics."""
        if trainer.is_global_zero:
            values = sorted(scores(trainer).items())
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in values)
            epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            print(
                f"epoch {trainer.current_epoch + 1}{epochs}  step {trainer.global_step}  {metrics}",
                flush=True,
            )


class MergeBest(Callback):
    """Has the best checkpoint merged where a fit has kept one, and the last weights elsewhere.

    A fit that stops before its first validation keeps none, which is known at its end only.

    Args:
        lora: The callback that merges.
    """

    def __init__(self, lora: LoRACallback) -> None:
        self.lora = lora

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what is merged."""
        kept = any(
            isinstance(found, ModelCheckpoint) and found.monitor and found.best_model_path
            for found in trainer.checkpoint_callbacks
        )
        self.lora.merge_from = "best" if kept else "last"


def scores(trainer: Trainer) -> dict[str, float]:
    """Return the latest metrics without the learning rates."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name != "lr" and not name.startswith("lr-")
    }


class MetricsBar(RichProgressBar):
    """The progress bar, with the metrics alone: which run it is stands in the closing block."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def progress_callbacks() -> list[Callback]:
    """Return a progress bar where someone watches, and lines where the output is kept."""
    if sys.stdout.isatty():
        return [MetricsBar(theme=RichProgressBarTheme(metrics_format=".3g"))]
    # A refresh rate of zero switches the bar off; without any bar Lightning would add its own.
    return [TQDMProgressBar(refresh_rate=0), EpochLines()]


def checkpoint_callbacks(model: Any, run_dir: Path, validates: bool) -> list[ModelCheckpoint]:
    """Return the callbacks that keep the best checkpoint and the last.

    Args:
        model: Says with `monitor` and `monitor_mode` which metric is the best by.
        run_dir: The run's folder.
        validates: Whether validation runs, and so whether there is a metric.
    """
    folder = run_dir / CHECKPOINTS
    # Not `save_last`: beside a metric, Lightning writes that one only when the best improves.
    last = ModelCheckpoint(dirpath=folder, filename=LAST, enable_version_counter=False)
    monitor = getattr(model, "monitor", None) if validates else None
    if monitor is None:
        return [last]
    mode = getattr(model, "monitor_mode", "min")
    return [ModelCheckpoint(dirpath=folder, filename="best", monitor=monitor, mode=mode), last]


def loggers(run_dir: Path) -> list[Logger]:
    """Return a CSV logger and, where it is installed, one for TensorBoard, into the run."""
    where: dict[str, Any] = {"name": "", "version": run_dir.name}
    _keep_earlier_metrics(run_dir)
    found: list[Logger] = [CSVLogger(run_dir.parent, **where)]
    if RequirementCache("tensorboard"):
        found.append(TensorBoardLogger(run_dir.parent, **where))
    return found


def quieten(resumes: bool) -> None:
    """Leave out messages that tell a user of the command nothing to act on.

    Args:
        resumes: Whether what a checkpoint says of others matters to what comes.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_worth_reading)
    if not resumes:
        warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
    for pattern in (
        ".*does not have many workers.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*is deprecated.*",
        ".*is smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", pattern)


_CHATTER = (
    "Tip:",
    "available: False",
    "TPU available",
    "Seed set to",
    "Restoring states from",
    "Loading `train_dataloader` to estimate",
    "`weights_only` was not set",
)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _CHATTER)


def missing_folders(run_dir: Path) -> list[Path]:
    """Return those of a run's folder and its parents that are not there yet, innermost first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def clear_unstarted(run_dir: Path, made: Sequence[Path]) -> None:
    """Undo what the loggers have begun for a fit that never started, and nothing else.

    Args:
        run_dir: The run's folder. Training that has started has written a config into it.
        made: The folders that were not there before, innermost first.
    """
    metrics, earlier = run_dir / METRICS_FILE, metrics_files(run_dir)
    if run_dir not in made:
        if earlier and not metrics.exists():
            earlier[-1].rename(metrics)
        return
    if not (run_dir / CONFIG_FILE).exists():
        for begun in run_dir.glob("events.out.tfevents.*"):
            begun.unlink()
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # not there, or not empty
            return


def _keep_earlier_metrics(run_dir: Path) -> None:
    """Move a resumed run's metrics aside: CSVLogger deletes what it finds."""
    metrics = run_dir / METRICS_FILE
    if metrics.is_file():
        number = len(metrics_files(run_dir))
        while (kept := run_dir / f"metrics_{number}.csv").exists():
            number += 1
        metrics.rename(kept)
        rank_zero_info(f"The earlier part of this run's metrics is kept in {kept}")
