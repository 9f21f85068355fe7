"""Exact resume: after a kill and a resume, bitwise the losses and weights of an uninterrupted run.

Lightning restores weights, optimizers and counters. It restores no random state, starts a plain
loader again at its first batch, and drops the validation and the accumulated gradients that were
pending when the checkpoint was written. `ExactResume` notes where in the loops a checkpoint is
taken, with the random state there and at the start of the epoch's iterator. On resume it brings the
loops to that place: make the iterator from the recorded state, consume the batches that were
trained, restore the random state of the moment, go on.

Not restored, because nothing holds it: the part before the interruption of epoch means
(`self.log(on_epoch=True)`, metric objects); what hooks after the saving callback did (checkpoint
callbacks run last, but the module's own hook follows them); samplers and datasets that keep private
random generators or stream from the global one in the main process; the random state inside
persistent workers past their first epoch; time-based triggers; iterators that `training_step`
itself advances.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.epoch_iterator import EpochIterator
from lightning_lora.gradients import gradients_of, restore_gradients
from lightning_lora.loop_hooks import LoopHooks, require_privates
from lightning_lora.places import (
    BATCH_DONE,
    BATCH_END,
    BETWEEN_EPOCHS,
    EPOCH_END,
    EPOCH_START,
    IDLE,
    IN_BATCH,
    VALIDATED,
    schedule_accumulation,
    settle_loops,
)
from lightning_lora.rank_states import choose_state, gather_states
from lightning_lora.rng import RngState


class ExactResume:
    """Makes a resumed fit continue bitwise where its checkpoint was taken.

    A callback forwards four calls: `install` from `setup` of the fit stage, `state_dict` and
    `load_state_dict` from its own, `uninstall` from `teardown`. Nothing depends on the order of the
    callbacks.
    """

    def __init__(self) -> None:
        self._hooks = LoopHooks()
        self._loaded: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._place = IDLE
        # The state to go back to when a checkpoint is taken in the midst of something; None: now.
        self._mark: RngState | None = None
        self._mark_at = 0
        self._mark_gradients: dict[str, torch.Tensor] = {}
        self._resume: dict[str, Any] | None = None
        self._metrics: dict[str, torch.Tensor] = {}
        self._return_to_batch_end = False

    def install(self, trainer: Trainer) -> None:
        """Begin to follow the trainer's loops; belongs in `setup`, before anything is restored.

        Args:
            trainer: The trainer whose fit is about to start.

        Raises:
            LightningLoRAError: When this version of Lightning lacks a private part that is needed.
        """
        self.uninstall()
        self._loaded = None
        self._forget()
        require_privates(trainer)
        self._trainer: Any = trainer
        self._fit: Any = trainer.fit_loop
        self._epoch: Any = self._fit.epoch_loop
        self._val: Any = self._epoch.val_loop
        self._iterator = EpochIterator(trainer)
        self._hooks.wrap(self._fit, "reset", self._reset)
        self._hooks.wrap(self._fit, "_load_combined_loader_states", self._loaders_ready)
        self._hooks.wrap(self._fit, "on_advance_start", self._start_epoch)
        self._hooks.wrap(self._fit, "on_advance_end", self._end_epoch)
        self._hooks.wrap(self._epoch, "reset", self._reset_epoch)
        self._hooks.wrap(self._epoch, "on_run_start", self._start_batches)
        self._hooks.wrap(self._epoch, "advance", self._advance)
        self._hooks.wrap(self._epoch, "on_advance_end", self._end_batch)
        self._hooks.wrap(self._epoch, "_get_monitor_value", self._monitored)
        self._hooks.wrap(self._val, "setup_data", self._iterator.around_validation_setup)
        self._hooks.wrap(self._val, "run", self._validate)
        self._hooks.wrap(self._val, "_on_evaluation_end", self._validation_done)

    def uninstall(self) -> None:
        """Leave the trainer's loops as Lightning made them. Checkpoints can still be taken."""
        self._hooks.undo()

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint needs for an exact resume; a collective call in a distributed run.

        Args:
            trainer: The trainer that is taking the checkpoint.

        Returns:
            Tensors and primitives: the states of all ranks, each with its own random state.
        """
        if self._loaded is not None and self._hooks.installed:
            return self._loaded
        return gather_states(self._rank_state(trainer), trainer.world_size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what `state_dict` returned until the fit reaches its loops.

        Args:
            state: The state from the checkpoint.
        """
        self._loaded = state

    # ---- taking the state -------------------------------------------------------------------

    def _rank_state(self, trainer: Trainer) -> dict[str, Any]:
        if self._place == IDLE:
            return {"place": IDLE}
        self._note_restarted_loaders()
        batches = self._epoch.batch_progress.current
        place, rng, gradients = self._place, self._mark, None
        if place == IN_BATCH:
            if batches.processed == batches.ready > self._mark_at:
                place, rng = BATCH_END, None
            else:
                # Backward may have added to the gradients what it will add again.
                place, gradients = BATCH_DONE, self._mark_gradients
        if gradients is None:
            gradients = self._accumulated_gradients(place)
        metrics = trainer.callback_metrics
        return {
            "place": place,
            "rng": rng or self._iterator.capture(),
            "iteration": self._iterator.record,
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
            "metrics": {
                config.monitor: metrics[config.monitor].detach().cpu().clone()
                for config in trainer.lr_scheduler_configs
                if config.reduce_on_plateau and config.monitor in metrics
            },
            "sampler_seeds": self._iterator.sampler_seeds(),
            "val_started": self._iterator.started_validation_workers(),
            "loaded_in_epoch": self._fit._last_train_dl_reload_epoch,
        }

    def _accumulated_gradients(self, place: str) -> dict[str, torch.Tensor]:
        """Those that the next batch adds to; most batches begin with none that count."""
        module, batches = self._trainer.lightning_module, self._epoch.batch_progress.current
        accumulating = (
            place not in BETWEEN_EPOCHS
            and batches.processed % self._trainer.accumulate_grad_batches
        )
        return gradients_of(module) if accumulating or not module.automatic_optimization else {}

    def _note_restarted_loaders(self) -> None:
        self._iterator.note_restarted_loaders(self._mark_at, self._mark)

    # ---- around the loops, in the order in which they run -----------------------------------

    def _loaders_ready(self, original: Callable[[], None]) -> None:
        original()
        if self._loaded is not None:
            self._choose_state()  # before the first iterator is made
        self._iterator.loaders_ready()

    def _reset(self, original: Callable[[], None]) -> None:
        self._choose_state()
        if self._resume is not None:
            self._metrics = self._resume["metrics"]
            settle_loops(self._fit, self._resume["place"])
        original()

    def _choose_state(self) -> None:
        if self._resume is not None or not self._fit.is_resuming:
            return
        trainer = self._trainer
        self._resume = choose_state(self._loaded, trainer.global_rank, trainer.world_size)
        if self._resume is not None:
            # Older checkpoints have no seeds.
            self._iterator.restore_sampler_seeds(self._resume.get("sampler_seeds", {}))

    def _start_epoch(self, original: Callable[[], None]) -> None:
        resume = self._resume
        if resume is not None:
            if self._trainer.reload_dataloaders_every_n_epochs:
                self._fit._last_train_dl_reload_epoch = resume["loaded_in_epoch"]
            self._iterator.start_validation_workers(resume["val_started"])
            restore_gradients(self._trainer.lightning_module, resume["gradients"])
        if resume is None or resume["place"] in BETWEEN_EPOCHS:
            if resume is not None:
                self._iterator.restore(resume["rng"])
            self._place, self._mark = EPOCH_START, self._iterator.capture()
        else:
            schedule_accumulation(self._trainer)
        original()

    def _reset_epoch(self, original: Callable[[], None]) -> None:
        with warnings.catch_warnings():
            if self._resume is not None:
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended")
            original()

    def _start_batches(self, original: Callable[[Any], None], fetcher: Any) -> None:
        resume, combined = self._resume, self._fit._combined_loader
        between = resume is not None and resume["place"] in BETWEEN_EPOCHS
        if between:
            # Lightning makes the iterator here in every epoch but the first of a process.
            self._fit._resuming_from_checkpoint = False
        iterator, record = combined._iterator, self._iterator.new_record()
        original(fetcher)
        if combined._iterator is not iterator:
            self._iterator.record = record
        elif resume is None:
            self._iterator.note_first_fetch()
        else:
            rng = self._iterator.capture() if between else resume["rng"]
            trained = self._epoch.batch_progress.current.processed
            self._iterator.replay(fetcher, resume["iteration"], trained)
            self._iterator.restore(rng)
        if resume is not None and not between:
            self._enter_epoch(resume["place"])
        self._resume = self._loaded = None
        self._mark = None
        self._note_restarted_loaders()

    def _enter_epoch(self, place: str) -> None:
        # Lightning's flags have done their work; left on, they would skip plateau schedulers.
        self._fit._restarting = self._val.restarting = self._val._has_run = False
        if place == BATCH_DONE:
            self._epoch.restarting = False
        else:
            self._return_to_batch_end = True
            self._epoch._skip_next_val = place == VALIDATED
        self._place = place

    def _advance(self, original: Callable[[Any], None], fetcher: Any) -> None:
        if self._return_to_batch_end:
            self._return_to_batch_end = False
            return
        self._note_restarted_loaders()
        self._place, self._mark = IN_BATCH, self._iterator.capture()
        self._mark_at = self._epoch.batch_progress.current.ready
        self._mark_gradients = self._accumulated_gradients(IN_BATCH)
        original(fetcher)

    def _end_batch(self, original: Callable[[Any], None], fetcher: Any) -> None:
        self._note_restarted_loaders()
        self._place, self._mark, self._mark_gradients = BATCH_END, None, {}
        try:
            original(fetcher)
        except SIGTERMException:
            if self._trainer.training:  # and not in the midst of a validation
                self._place, self._mark = BATCH_DONE, None
            raise
        self._place, self._mark = BATCH_DONE, None

    def _validate(self, original: Callable[[], Any]) -> Any:
        if self._place == BATCH_END:
            self._mark = self._iterator.capture()
        return original()

    def _validation_done(self, original: Callable[[], None]) -> None:
        if self._place == BATCH_END:
            self._place, self._mark = VALIDATED, None
        original()

    def _monitored(self, original: Callable[[str], Any], key: str) -> Any:
        value = original(key)
        return self._metrics.get(key) if value is None else value

    def _end_epoch(self, original: Callable[[], None]) -> None:
        self._place, self._mark = EPOCH_END, None
        self._iterator.record = None
        original()
