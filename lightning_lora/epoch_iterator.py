"""The iterator over an epoch's batches: how it was made, and how to make it again.

This module, `lightning_lora.loop_hooks`, `lightning_lora.places` and `lightning_lora.resume`
are the only ones that know private parts of the loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.rng import (
    RngState,
    SamplerSeeds,
    capture_rng,
    loader_generators,
    restore_rng,
)


def _persistent_and_started(loaders: Iterable[Any]) -> list[bool]:
    """For each loader, whether `iter` will reuse its workers and so draw no new base seed."""
    return [
        getattr(loader, "persistent_workers", False) and loader._iterator is not None
        for loader in loaders
    ]


class EpochIterator:
    """Follows the loaders of a fit, and the iterator of the training ones from epoch to epoch.

    Args:
        trainer: The trainer whose fit is followed.

    Attributes:
        record: What `replay` needs of the current epoch: tensors and primitives. None between
            epochs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._fit: Any = trainer.fit_loop
        self._val: Any = self._fit.epoch_loop.val_loop
        self.record: dict[str, Any] | None = None
        self._sources: list[Any] = []
        self._generators: list[torch.Generator] = []
        self._seeds = {"train": SamplerSeeds(), "val": SamplerSeeds()}

    def capture(self) -> RngState:
        """The random state of this process and of the loaders' own generators."""
        return capture_rng(self._generators)

    def restore(self, rng: RngState | None) -> None:
        """Put back what `capture` returned; None: nothing."""
        if rng is not None:
            restore_rng(rng, self._generators)

    def loaders_ready(self) -> None:
        """Follow new loaders, whose first iterator is about to be made."""
        self._seeds["train"].put_into(self._loaders("train"))
        self._generators = loader_generators(self._loaders("train"))
        self.record = self.new_record()

    def new_record(self) -> dict[str, Any]:
        """The record of an iterator that is made now."""
        started = _persistent_and_started(self._loaders("train"))
        return {"rng": self.capture(), "started": started, "fetches": {}}

    def note_first_fetch(self) -> None:
        """Note that an iterator made earlier is used from now on."""
        if self.record is not None:
            self.record["fetches"]["first"] = {"at": 0, "rng": self.capture()}

    def note_restarted_loaders(self, at: int, rng: RngState | None) -> None:
        """Note which loaders began anew within the epoch: the shorter ones of several cycle.

        Args:
            at: The number of the batch since whose beginning that may have happened.
            rng: The random state at that beginning, if it is known.
        """
        iterator = getattr(self._fit._combined_loader, "_iterator", None)
        iterators = getattr(iterator, "iterators", [])
        # Persistent workers reuse the iterator object but not its sampler's.
        sources = [getattr(each, "_sampler_iter", each) for each in iterators]
        if self.record is not None and rng is not None:
            for index, (old, new) in enumerate(zip(self._sources, sources, strict=False)):
                if old is not new:
                    self.record["fetches"][f"loader {index}"] = {"at": at, "rng": rng}
        self._sources = sources

    def replay(self, fetcher: Any, record: dict[str, Any] | None, trained: int) -> None:
        """Make the epoch's iterator as it was made, and consume the batches that were trained.

        Args:
            fetcher: Lightning's fetcher of batches.
            record: The record from the checkpoint, or None to go by the position alone.
            trained: How many batches were trained.
        """
        combined: Any = self._fit._combined_loader
        stateful = [hasattr(each, "load_state_dict") for each in combined.flattened]
        batches_left = not self._fit.epoch_loop._num_ready_batches_reached() or not trained
        self.record = record
        if not batches_left or all(stateful):
            return  # an iterator at its end is not used again; stateful loaders restore themselves
        if any(stateful) or hasattr(fetcher, "iterator_wrapper"):
            rank_zero_warn(
                "The position within the epoch is not restored: that is not possible for a"
                " `training_step` that takes an iterator, nor for stateful loaders mixed with"
                " plain ones. The resumed run is not the exact continuation."
            )
            return
        if record is None or not any(record["started"]):
            combined.reset()
        fetches: dict[int, RngState] = {}
        if record is not None:
            self.restore(record["rng"])
            fetches = {fetch["at"]: fetch["rng"] for fetch in record["fetches"].values()}
        iter(fetcher)
        for index in range(trained):
            self.restore(fetches.get(index))
            next(fetcher)

    def sampler_seeds(self) -> dict[str, list[int]]:
        """The seeds of samplers that shuffle by one."""
        return {stage: SamplerSeeds.of(self._loaders(stage)) for stage in self._seeds}

    def restore_sampler_seeds(self, seeds: dict[str, list[int]]) -> None:
        """Put back what `sampler_seeds` returned, also into loaders that are made later.

        Args:
            seeds: What it returned; empty: samplers keep the seeds of this process.
        """
        for stage, saved in seeds.items():
            self._seeds[stage] = SamplerSeeds(saved)
            if self._loaders(stage):
                self._seeds[stage].put_into(self._loaders(stage))

    def around_validation_setup(self, original: Callable[[], None]) -> None:
        """Let the validation loop set up its loaders, and follow those that are new."""
        original()
        if self._loaders("val"):
            self._seeds["val"].put_into(self._loaders("val"))

    def _loaders(self, stage: str) -> list[Any]:
        combined: Any = {"train": self._fit, "val": self._val}[stage]._combined_loader
        return [] if combined is None else list(combined.flattened)

    def started_validation_workers(self) -> list[bool]:
        """For each validation loader, whether its workers have started and stay."""
        return _persistent_and_started(self._loaders("val"))

    def start_validation_workers(self, started: list[bool]) -> None:
        """Start workers that the first run had already started, so that it costs no draw later.

        Args:
            started: What `started_validation_workers` returned.
        """
        if not any(started):
            return
        if self._val._combined_loader is None:
            self._trainer.validating = True
            self._val.setup_data()
            self._trainer.training = True
        for loader, was_started in zip(self._loaders("val"), started, strict=False):
            if was_started and loader._iterator is None:
                iter(loader)
