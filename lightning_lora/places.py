"""Where in Lightning's loops a checkpoint is taken, and the loops brought there again.

This module, `lightning_lora.epoch_iterator`, `lightning_lora.loop_hooks` and
`lightning_lora.resume` are the only ones that know private parts of the loops.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

IDLE = "idle"
EPOCH_START = "epoch_start"  # before the epoch's first batch
IN_BATCH = "in_batch"
BATCH_END = "batch_end"  # trained; validation, plateau schedulers and counters are still to come
VALIDATED = "validated"  # as above, with the validation behind it
BATCH_DONE = "batch_done"  # the next thing is to fetch a batch
EPOCH_END = "epoch_end"
BETWEEN_EPOCHS = (EPOCH_START, EPOCH_END)


def settle_loops(fit: Any, place: str) -> None:
    """Let the loops' counters say that what was only begun is still to come.

    Args:
        fit: Lightning's fit loop, with the counters of a checkpoint.
        place: Where the checkpoint was taken.
    """
    epochs, epoch = fit.epoch_progress, fit.epoch_loop
    if place in BETWEEN_EPOCHS:
        unfinished = epochs.current.completed < epochs.current.processed
        if place == EPOCH_END and unfinished and epoch._num_ready_batches_reached():
            # In Lightning's order this follows the hook that took the checkpoint.
            epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        _settle(epochs)
        fit.restarting = epoch.restarting = False
        # The setter keeps a run that is limited by steps restarting, even between epochs.
        fit._restarting = False
    batches = epoch.batch_progress
    # Set when the last batch was fetched, which here happens again.
    batches.is_last_batch &= batches.current.ready == batches.current.processed
    _settle(batches)


def _settle(progress: Any) -> None:
    """Count what was finished and forget what was only begun."""
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = counts.completed = counts.processed


def schedule_accumulation(trainer: Trainer) -> None:
    """Accumulate as many batches as the schedule says, if the trainer has one.

    Lightning follows it when an epoch starts, and skips that when it goes on within an epoch.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
