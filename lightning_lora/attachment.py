"""Between a Trainer and its strategy: an adapted model is set up, saved and loaded by the rules of
the adapter, on every path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora import tokenizer_files
from lightning_lora.averaging import CURRENT, fill_in_base, keep_adapter
from lightning_lora.checkpoints import (
    explain_unreadable,
    optimizer_names,
    optimizer_states,
    require_metadata,
    require_training_state,
)
from lightning_lora.files import replacing_file
from lightning_lora.freezing import refuse_unfrozen
from lightning_lora.injection import require_injection
from lightning_lora.layers.siblings import join_layers, joined_layers
from lightning_lora.metadata import (
    METADATA_KEY,
    audit_metadata,
    base_fingerprint,
    checkpoint_metadata,
)
from lightning_lora.names import modules_by_name
from lightning_lora.state import audit_state
from lightning_lora.strategies import sharding_of


class Attachment:
    """Wraps the methods of a strategy that set a model up, save and load it.

    Callback hooks do not fire on every path (weights-only saves, sharded saves, models built late);
    these methods do. The instance is wrapped, once; classes stay as they are.

    Args:
        strategy: The Trainer's strategy.
        prepare: Brings the model into the state that a stage starts from: adapted, unmerged,
            frozen.
        check: Refuses, before the strategy wraps the model, what the end of the fit could not do.
        start: Loads, once the model is set up, what a fit starts from.

    Attributes:
        sharding: How the strategy lays the model out.
        prepare: See above.
        check: See above.
        start: See above.
    """

    def __init__(
        self,
        strategy: Strategy,
        prepare: Callable[[LightningModule], None],
        check: Callable[[LightningModule], None],
        start: Callable[[LightningModule], None],
    ) -> None:
        self.sharding = sharding_of(strategy)
        self._strategy = strategy
        self.prepare, self.check, self.start = prepare, check, start
        wrapped: Any = strategy
        wrapped.setup = partial(self._setup, strategy.setup)
        wrapped.load_checkpoint = partial(self._load_checkpoint, strategy.load_checkpoint)
        wrapped.load_model_state_dict = self._load_model_state_dict
        wrapped.load_optimizer_state_dict = partial(
            self._load_optimizers, strategy.load_optimizer_state_dict
        )
        wrapped.lightning_module_state_dict = self._module_state_dict
        wrapped.optimizer_state = partial(self.sharding.optimizer_state, strategy.optimizer_state)
        wrapped.save_checkpoint = partial(
            self._save_checkpoint, _writing_beside(strategy.save_checkpoint, strategy)
        )

    @property
    def _model(self) -> LightningModule:
        module = self._strategy.lightning_module
        assert module is not None
        return module

    def _setup(self, original: Any, trainer: Trainer) -> None:
        model = self._model
        self.prepare(model)
        self.check(model)
        self.sharding.setup(original, trainer, model)
        base_fingerprint(model)
        self.start(model)

    def _load_checkpoint(self, original: Any, checkpoint_path: Any, **kwargs: Any) -> Any:
        model = self._model
        self.prepare(model)
        with explain_unreadable(checkpoint_path):
            checkpoint = self.sharding.read(original, checkpoint_path, **kwargs)
        source = str(checkpoint_path)
        # Before any part of the checkpoint reaches the model, the loops or the optimizers.
        audit_metadata(model, require_metadata(checkpoint, source), source)
        if not is_overridden("on_load_checkpoint", model):
            # A hook of the module's may give the tensors the names that they have here.
            for key in ("state_dict", CURRENT):
                audit_state(model, checkpoint.get(key, checkpoint["state_dict"]), source)
        if model.trainer.state.fn == TrainerFn.FITTING:
            require_training_state(checkpoint, source)
            join_layers(modules_by_name(model), checkpoint[METADATA_KEY].get("joined", ()))
            if self.sharding.is_sharded:
                # Lightning leaves it to such strategies.
                self._load_optimizers(None, checkpoint)
        return checkpoint

    def _load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.sharding.load_state(self._model, checkpoint["state_dict"], "the checkpoint")
        fill_in_base(checkpoint, self._model)

    def _load_optimizers(self, original: Any, checkpoint: Any) -> None:
        states = optimizer_states(checkpoint, self._strategy.optimizers, self._model)
        self.sharding.load_optimizers(original, {**checkpoint, "optimizer_states": states})

    def _module_state_dict(self) -> dict[str, Any]:
        return self.sharding.state(self._model)

    def _save_checkpoint(
        self, original: Any, checkpoint: dict[str, Any], path: Any, **kwargs: Any
    ) -> None:
        model = self._model
        if model.trainer.training:
            refuse_unfrozen(model, require_injection(model).plan)
        keep_adapter(checkpoint)
        modules = modules_by_name(model)
        checkpoint[METADATA_KEY] = {
            **checkpoint_metadata(model),
            "optimizers": optimizer_names(self._strategy.optimizers, modules),
            "joined": joined_layers(modules),
            tokenizer_files.KEY: tokenizer_files.tokenizer_settings(
                tokenizer_files.tokenizer_of(model, getattr(model.trainer, "datamodule", None))
            ),
        }
        self.sharding.save(original, checkpoint, path, **kwargs)


def _writing_beside(original: Callable[..., None], strategy: Strategy) -> Callable[..., None]:
    """A strategy's way of writing a checkpoint file, of which nothing half-written is left.

    Lightning writes to the system's folder for temporary files and moves the file from there, which
    is a copy where that is another disk.

    Args:
        original: Writes a checkpoint to a path.
        strategy: The strategy whose method it is.

    Returns:
        A function that does so and raises `CheckpointError` if the disk is full.
    """
    plain = type(strategy.checkpoint_io) is TorchCheckpointIO

    def write(checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        target = Path(path)
        if not (plain and strategy.is_global_zero) or "://" in str(path) or target.is_dir():
            original(checkpoint, path, **options)
            return
        with replacing_file(target) as fresh:
            original(checkpoint, fresh, **options)

    return write
