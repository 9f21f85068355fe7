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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.gradients import gradients_of, restore_gradients
from lightning_lora.loop_hooks import LoopHooks, require_privates
from lightning_lora.rng import RngState, capture_rng, loader_generators, restore_rng
from lightning_lora.samplers import sampler_seeds, seed_samplers

# Where in the loops a checkpoint is taken.
_IDLE = "idle"
_EPOCH_START = "epoch_start"  # before the epoch's first batch
_IN_BATCH = "in_batch"
_BATCH_END = "batch_end"  # trained; validation, plateau schedulers and counters are still to come
_VALIDATED = "validated"  # as above, with the validation behind it
_BATCH_DONE = "batch_done"  # the next thing is to fetch a batch
_EPOCH_END = "epoch_end"
_BETWEEN_EPOCHS = (_EPOCH_START, _EPOCH_END)


def _persistent_and_started(loaders: Iterable[Any]) -> list[bool]:
    """For each loader, whether `iter` will reuse its workers and so draw no new base seed."""
    return [
        getattr(loader, "persistent_workers", False) and loader._iterator is not None
        for loader in loaders
    ]


def _settle(progress: Any) -> None:
    """Count what was finished and forget what was only begun."""
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = counts.completed = counts.processed


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
        self._place = _IDLE
        # The state to go back to when a checkpoint is taken in the midst of something; None: now.
        self._mark: RngState | None = None
        self._mark_at = 0
        self._mark_gradients: dict[str, torch.Tensor] = {}
        self._seeds: list[int | None] = []
        self._iteration: dict[str, Any] | None = None
        self._sources: list[Any] = []
        self._generators: list[torch.Generator] = []
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
        self._hooks.wrap(self._fit, "reset", self._reset)
        self._hooks.wrap(self._fit, "_load_combined_loader_states", self._loaders_ready)
        self._hooks.wrap(self._fit, "on_advance_start", self._start_epoch)
        self._hooks.wrap(self._fit, "on_advance_end", self._end_epoch)
        self._hooks.wrap(self._epoch, "reset", self._reset_epoch)
        self._hooks.wrap(self._epoch, "on_run_start", self._start_batches)
        self._hooks.wrap(self._epoch, "advance", self._advance)
        self._hooks.wrap(self._epoch, "on_advance_end", self._end_batch)
        self._hooks.wrap(self._epoch, "_get_monitor_value", self._monitored)
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
        mine = self._rank_state(trainer)
        ranks: list[Any] = [mine]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        return {"version": 1, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what `state_dict` returned until the fit reaches its loops.

        Args:
            state: The state from the checkpoint.
        """
        self._loaded = state

    # ---- taking the state -------------------------------------------------------------------

    def _rank_state(self, trainer: Trainer) -> dict[str, Any]:
        if self._place == _IDLE:
            return {"place": _IDLE}
        self._note_restarted_loaders()
        module, batches = trainer.lightning_module, self._epoch.batch_progress.current
        place, rng = self._place, self._mark
        gradients: dict[str, torch.Tensor] = {}
        trained = batches.processed == batches.ready > self._mark_at
        if place == _IN_BATCH and not trained:
            # The batch will be run again, upon what there was before it.
            place, gradients = _BATCH_DONE, self._mark_gradients
        else:
            place, rng = (_BATCH_END, None) if place == _IN_BATCH else (place, rng)
            accumulated = batches.processed % trainer.accumulate_grad_batches
            if (place not in _BETWEEN_EPOCHS and accumulated) or not module.automatic_optimization:
                gradients = gradients_of(module)
        val = self._val._combined_loader
        metrics = trainer.callback_metrics
        return {
            "place": place,
            "rng": rng or self._capture(),
            "iteration": self._iteration,
            "gradients": {name: gradient.cpu().clone() for name, gradient in gradients.items()},
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "seeds": sampler_seeds(self._fit._combined_loader.flattened),
            "metrics": {
                config.monitor: metrics[config.monitor].detach().cpu().clone()
                for config in trainer.lr_scheduler_configs
                if config.reduce_on_plateau and config.monitor in metrics
            },
            "val_started": _persistent_and_started(() if val is None else val.flattened),
            "loaded_in_epoch": self._fit._last_train_dl_reload_epoch,
        }

    def _capture(self) -> RngState:
        return capture_rng(self._generators)

    def _note_restarted_loaders(self) -> None:
        """Note which loaders began anew within the epoch: the shorter ones of several cycle."""
        iterator = getattr(self._fit._combined_loader, "_iterator", None)
        iterators = getattr(iterator, "iterators", [])
        # Persistent workers reuse the iterator object but not its sampler's.
        sources = [getattr(each, "_sampler_iter", each) for each in iterators]
        if self._iteration is not None and self._mark is not None:
            for index, (old, new) in enumerate(zip(self._sources, sources, strict=False)):
                if old is not new:
                    fetch = {"at": self._mark_at, "rng": self._mark}
                    self._iteration["fetches"][f"loader {index}"] = fetch
        self._sources = sources

    def _new_iteration(self) -> dict[str, Any]:
        started = _persistent_and_started(self._fit._combined_loader.flattened)
        return {"rng": self._capture(), "started": started, "fetches": {}}

    # ---- around the loops, in the order in which they run -----------------------------------

    def _loaders_ready(self, original: Callable[[], None]) -> None:
        original()
        seed_samplers(self._fit._combined_loader.flattened, self._seeds)
        self._generators = loader_generators(self._fit._combined_loader.flattened)
        self._iteration = self._new_iteration()

    def _reset(self, original: Callable[[], None]) -> None:
        if self._fit.is_resuming:
            self._resume = self._choose_rank_state()
        if self._resume is not None:
            self._metrics = self._resume["metrics"]
            self._seeds = self._resume.get("seeds", [])
            seed_samplers(self._fit._combined_loader.flattened, self._seeds)
            self._settle_loops(self._resume["place"])
        original()

    def _settle_loops(self, place: str) -> None:
        epochs = self._fit.epoch_progress
        if place in _BETWEEN_EPOCHS:
            unfinished = epochs.current.completed < epochs.current.processed
            if place == _EPOCH_END and unfinished and self._epoch._num_ready_batches_reached():
                # In Lightning's order this follows the hook that took the checkpoint.
                self._epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            _settle(epochs)
            self._fit.restarting = self._epoch.restarting = False
            # The setter keeps a run that is limited by steps restarting, even between epochs.
            self._fit._restarting = False
        batches = self._epoch.batch_progress
        # Set when the last batch was fetched, which here happens again.
        batches.is_last_batch &= batches.current.ready == batches.current.processed
        _settle(batches)

    def _start_epoch(self, original: Callable[[], None]) -> None:
        resume = self._resume
        if resume is not None:
            if self._trainer.reload_dataloaders_every_n_epochs:
                self._fit._last_train_dl_reload_epoch = resume["loaded_in_epoch"]
            self._start_validation_workers(resume["val_started"])
        if resume is None or resume["place"] in _BETWEEN_EPOCHS:
            if resume is not None:
                self._restore(resume["rng"])
            self._place, self._mark = _EPOCH_START, self._capture()
        original()

    def _reset_epoch(self, original: Callable[[], None]) -> None:
        with warnings.catch_warnings():
            if self._resume is not None:
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended")
            original()

    def _start_batches(self, original: Callable[[Any], None], fetcher: Any) -> None:
        resume, combined = self._resume, self._fit._combined_loader
        between = resume is not None and resume["place"] in _BETWEEN_EPOCHS
        if between:
            # Lightning makes the iterator here in every epoch but the first of a process.
            self._fit._resuming_from_checkpoint = False
        iterator, iteration = combined._iterator, self._new_iteration()
        original(fetcher)
        if combined._iterator is not iterator:
            self._iteration = iteration
        elif resume is None and self._iteration is not None:
            self._iteration["fetches"]["first"] = {"at": 0, "rng": self._capture()}
        elif resume is not None:
            rng = self._capture() if between else resume["rng"]
            self._replay(fetcher, resume["iteration"], self._epoch.batch_progress.current.processed)
            self._restore(rng)
        if resume is not None and not between:
            restore_gradients(self._trainer.lightning_module, resume["gradients"])
            if any(isinstance(c, GradientAccumulationScheduler) for c in self._trainer.callbacks):
                # Which sets it at the start of an epoch, and this one began in the first run.
                self._trainer.accumulate_grad_batches = resume.get(
                    "accumulate_grad_batches", self._trainer.accumulate_grad_batches
                )
            self._enter_epoch(resume["place"])
        self._resume = self._loaded = None
        self._mark = None
        self._note_restarted_loaders()

    def _enter_epoch(self, place: str) -> None:
        # Lightning's flags have done their work; left on, they would skip plateau schedulers.
        self._fit._restarting = self._val.restarting = self._val._has_run = False
        if place == _BATCH_DONE:
            self._epoch.restarting = False
        else:
            self._return_to_batch_end = True
            self._epoch._skip_next_val = place == _VALIDATED
        self._place = place

    def _advance(self, original: Callable[[Any], None], fetcher: Any) -> None:
        if self._return_to_batch_end:
            self._return_to_batch_end = False
            return
        self._note_restarted_loaders()
        self._place, self._mark = _IN_BATCH, self._capture()
        self._mark_at = self._epoch.batch_progress.current.ready
        module = self._trainer.lightning_module
        accumulated = self._mark_at % self._trainer.accumulate_grad_batches
        pending = accumulated or not module.automatic_optimization
        self._mark_gradients = gradients_of(module) if pending else {}
        original(fetcher)

    def _end_batch(self, original: Callable[[Any], None], fetcher: Any) -> None:
        self._note_restarted_loaders()
        self._place, self._mark = _BATCH_END, None
        try:
            original(fetcher)
        except SIGTERMException:
            if self._trainer.training:  # and not in the midst of a validation
                self._place, self._mark = _BATCH_DONE, None
            raise
        self._place, self._mark = _BATCH_DONE, None

    def _validate(self, original: Callable[[], Any]) -> Any:
        if self._place == _BATCH_END:
            self._mark = self._capture()
        return original()

    def _validation_done(self, original: Callable[[], None]) -> None:
        if self._place == _BATCH_END:
            self._place, self._mark = _VALIDATED, None
        original()

    def _monitored(self, original: Callable[[str], Any], key: str) -> Any:
        value = original(key)
        return self._metrics.get(key) if value is None else value

    def _end_epoch(self, original: Callable[[], None]) -> None:
        self._place, self._mark, self._iteration = _EPOCH_END, None, None
        original()

    # ---- putting the state back -------------------------------------------------------------

    def _choose_rank_state(self) -> dict[str, Any] | None:
        if self._loaded is None:
            rank_zero_warn(
                "The checkpoint holds no exact-resume state (it was written without it), so"
                " dropout, shuffling and the position within the epoch are not those of the first"
                " run."
            )
            return None
        ranks = self._loaded["ranks"]
        if ranks[0]["place"] == _IDLE:
            return None
        if len(ranks) == self._trainer.world_size:
            return ranks[self._trainer.global_rank]
        rank_zero_warn(
            f"The checkpoint was written by {len(ranks)} processes and is resumed by"
            f" {self._trainer.world_size}: the number of batches that each process has trained in"
            " this epoch is kept, but not the random states or gradients in accumulation, so the"
            " resumed run is not the exact continuation. Use as many processes for that."
        )
        return {**ranks[0], "rng": None, "iteration": None, "gradients": {}}

    def _restore(self, rng: RngState | None) -> None:
        if rng is not None:
            restore_rng(rng, self._generators)

    def _start_validation_workers(self, started: list[bool]) -> None:
        """Start workers that the first run had already started, so that it costs no draw later."""
        if not any(started):
            return
        if self._val._combined_loader is None:
            self._trainer.validating = True
            self._val.setup_data()
            self._trainer.training = True
        for loader, was_started in zip(self._val._combined_loader.flattened, started, strict=False):
            if was_started and loader._iterator is None:
                iter(loader)

    def _replay(self, fetcher: Any, iteration: dict[str, Any] | None, trained: int) -> None:
        """Make the epoch's iterator as it was made, and consume the batches that were trained."""
        combined: Any = self._fit._combined_loader
        stateful = [hasattr(each, "load_state_dict") for each in combined.flattened]
        batches_left = not self._epoch._num_ready_batches_reached() or not trained
        self._iteration = iteration
        if not batches_left or all(stateful):
            return  # an iterator at its end is not used again; stateful loaders restore themselves
        if any(stateful) or hasattr(fetcher, "iterator_wrapper"):
            rank_zero_warn(
                "The position within the epoch is not restored: that is not possible for a"
                " `training_step` that takes an iterator, nor for stateful loaders mixed with"
                " plain ones. The resumed run is not the exact continuation."
            )
            return
        if iteration is None or not any(iteration["started"]):
            combined.reset()
        fetches: dict[int, RngState] = {}
        if iteration is not None:
            self._restore(iteration["rng"])
            fetches = {fetch["at"]: fetch["rng"] for fetch in iteration["fetches"].values()}
        iter(fetcher)
        for index in range(trained):
            self._restore(fetches.get(index))
            next(fetcher)
