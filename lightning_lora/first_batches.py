"""The first batches of a fit, run before it for an initialisation that depends on data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
from torch import nn
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader

from lightning_lora.errors import ConfigError
from lightning_lora.initialization.inputs import (
    Components,
    initialize_from_inputs,
    starts_from_zero,
)
from lightning_lora.injection import require_injection
from lightning_lora.names import modules_by_name
from lightning_lora.rng import capture_rng, loader_generators, restore_rng


def initialize_from_first_batches(
    trainer: Trainer, model: LightningModule, batches: int, is_sharded: bool
) -> None:
    """Start the factors from what their layers are given in the first training batches.

    The fit that follows sees the same random numbers and batches as without it. Each process runs
    its own batches, and all come to the same factors. Of a step only what leads up to the adapted
    layers is run, and nothing is logged. A model that has been trained, loaded or initialised from
    inputs is left alone.

    Args:
        trainer: A trainer whose training is about to start.
        model: Its LightningModule.
        batches: How many batches each process runs.
        is_sharded: Whether a process holds a part of the model alone.

    Raises:
        ConfigError: The model is sharded, the module optimizes manually, or the inputs do not
            suffice.
    """
    if is_sharded:
        raise ConfigError(
            "init='eva' runs the whole model before training, and this strategy shards it. Start "
            "the fit with strategy='ddp' or on one device (its checkpoints can be resumed with any "
            "strategy), or use init='kaiming' or 'pissa'."
        )
    if require_injection(model).from_inputs or not starts_from_zero(model):
        return
    if not model.automatic_optimization:
        raise ConfigError(
            "init='eva' runs training_step before the fit, which would step the optimizers of a "
            "module that optimizes manually. Call initialize_from_inputs before the fit, or use "
            "init='kaiming'."
        )
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    generators = loader_generators(combined.flattened)
    state = capture_rng(generators)
    try:
        with _logging_nothing(model), _leaving_early(model) as run:
            initialize_from_inputs(
                model,
                islice(_batches(trainer, model, combined), batches),
                lambda batch: run(trainer, batch),
                lambda found: _joined(trainer, found),
            )
    finally:
        restore_rng(state, generators)


class _Fresh:
    """A loader's batches from the start, by workers of their own."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        # iter() would hand out the persistent workers that the fit is going to use.
        is_ordinary = isinstance(self.loader, DataLoader)
        return self.loader._get_iterator() if is_ordinary else iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def _batches(trainer: Trainer, model: LightningModule, combined: CombinedLoader) -> Iterator[Any]:
    loaders = [_Fresh(loader) for loader in combined.flattened]
    for batch, *_ in CombinedLoader(tree_unflatten(loaders, combined._spec), combined._mode):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


class _Enough(BaseException):
    """What is needed of a step has been run."""


@contextmanager
def _leaving_early(model: LightningModule) -> Iterator[Any]:
    """A way to run a training step up to where the adapted layers have been run.

    What follows (metrics, lists of losses) is to see the batches of the fit alone.
    """
    targets = [target.name for target in require_injection(model).plan.targets]
    tops = {name.partition(".")[0] for name in targets}
    parts = {name: modules_by_name(model)[name] for name in tops}
    waiting: set[str] = set()

    def done(name: str) -> None:
        waiting.discard(name)
        if not waiting:
            raise _Enough

    def run(trainer: Trainer, batch: Any) -> None:
        waiting.update(parts)
        try:
            with trainer.precision_plugin.train_step_context():
                model.training_step(batch, 0)
        except _Enough:
            pass

    handles = [
        part.register_forward_hook(lambda *_, name=name: done(name))
        for name, part in parts.items()
        if not isinstance(part, (nn.ModuleList, nn.ModuleDict))
    ]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _logging_nothing(model: LightningModule) -> Iterator[None]:
    silent = {"log": lambda *_, **__: None, "log_dict": lambda *_, **__: None}
    model.__dict__.update(silent)
    try:
        yield
    finally:
        for name in silent:
            del model.__dict__[name]


def _joined(trainer: Trainer, found: dict[str, Components]) -> dict[str, Components]:
    """What all processes have found, the same in each."""
    if trainer.world_size == 1:
        return found
    everything: list[Any] = [None] * trainer.world_size
    mine = {name: vars(each) for name, each in found.items()}
    mine = move_data_to_device(mine, torch.device("cpu"))
    torch.distributed.all_gather_object(everything, mine)
    joined: dict[str, Components] = {}
    for name, each in found.items():
        joined[name] = Components(each.keep)
        for theirs in everything:
            joined[name].join(Components(**theirs[name]))
    # Kernels may differ from process to process in the last bit.
    agreed = trainer.strategy.broadcast({name: vars(each) for name, each in joined.items()})
    return {name: Components(**values) for name, values in agreed.items()}
