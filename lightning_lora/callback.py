"""`LoRACallback`: LoRA for any LightningModule, through the hooks of Lightning's life cycle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adaptation import adapt
from lightning_lora.attachment import Attachment
from lightning_lora.averaging import average_from, check_weight_averaging
from lightning_lora.best import check_best_checkpoint, check_hyperparameters, load_best
from lightning_lora.callback_settings import callback_problems
from lightning_lora.checks import (
    check_finetuning,
    check_frozen_dtype,
    check_gradients,
    check_loss,
    check_modes,
    check_optimizers,
    check_strategy,
    check_training,
)
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, SettingsError
from lightning_lora.export import announce_export, export_model
from lightning_lora.first_batches import initialize_from_first_batches
from lightning_lora.freezing import cast_frozen, check_dtype, freeze, refuse_unfrozen
from lightning_lora.injection import (
    forget_rebuilt,
    inject_lora,
    injection_of,
    require_injection,
)
from lightning_lora.plan import Plan
from lightning_lora.quantized_merging import MergeReport, merging_into
from lightning_lora.resume import ExactResume
from lightning_lora.starting import resumes, starting_state
from lightning_lora.strategies import Replicated


class LoRACallback(Callback):
    """Adapt the LightningModule with LoRA: inject, train, checkpoint the adapter alone, resume,
    merge.

    - Layers are adapted after the model has been built (in ``__init__``, ``setup`` or
      ``configure_model``) and before the strategy wraps it; everything but the factors is frozen.
    - Every checkpoint holds the trained state alone and says what it belongs to. Loading compares
      settings, targets and base first, and refuses what does not fit.
    - When a fit ends, the factors are merged into plain layers; before the next stage the exact
      base is restored.

    Args:
        r: See `LoRAConfig`, as for every argument up to ``init``. With 0 no layer is adapted, and
            only what else is set to train does so.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input while training.
        target_modules: ``"all-linear"``, ``"qv"``, ``"attention"``, a list of name suffixes, or a
            regex.
        exclude_modules: Suffixes or a regex for layers that are left alone.
        layers_to_transform: Numbers of the blocks whose layers are adapted; negative ones count
            from the last.
        layers_pattern: Names of the containers that hold the blocks.
        rank_pattern: Ranks of particular layers.
        alpha_pattern: Alphas of particular layers.
        bias: ``"none"``, ``"lora_only"`` or ``"all"``.
        train_layer_norms: Train the LayerNorms and RMSNorms.
        train_embeddings: Train the embedding tables.
        trainable_token_indices: Rows of the embeddings that train.
        modules_to_save: Modules that are trained whole; ``"auto"`` for the heads of Hugging Face
            task models.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        use_dora: Let a magnitude for each output feature train too (DoRA, arXiv:2402.09353).
        freeze_A: Train B alone (LoRA-FA).
        init: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"``, ``"pissa"``, ``"pissa_niter_4"``,
            ``"olora"``, ``"eva"``, or ``"loftq"`` for a quantized base.
        loftq_iter: Rounds of ``"loftq"``.
        init_from: A checkpoint, or a folder in PEFT format, whose factors and trained weights the
            first fit starts from; one that resumes a checkpoint starts from that.
        merge_on_fit_end: Merge when a fit ends.
        merge_from: Merge the ``"last"`` weights, or those of the ``"best"`` checkpoint.
        merge_base: What a quantized base is replaced by while it is merged: ``"dequantized"``
            weights in the dtype of the rest of the model, the ``"original"`` ones from the model's
            files, or ``"requantized"``, which stays packed and rounds the update; the report says
            what each costs.
        export_dir: Folder for the merged model (``merged``) and the adapter in PEFT format
            (``adapter``), written when a fit ends.
        frozen_dtype: Keep the frozen matrices in ``"bf16"`` or ``"fp16"`` (for mixed precision), or
            as they are.
        init_batches: How many training batches each process runs before a fit with ``init="eva"``.
        exact_resume: Also save and restore random states and the position in the data, so that a
            resumed run continues bitwise where it was interrupted.
        verbose: Print what was adapted.

    Attributes:
        plan: What was adapted, once the model is known.
        merge_report: What the latest merge into a quantized base cost.
        exported: The folders that were exported, by what they hold.

    Raises:
        ConfigError: Invalid settings, at construction.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = dict(accelerator="cpu", max_steps=2, logger=False)
        >>> quiet = dict(enable_progress_bar=False, enable_model_summary=False)
        >>> lora = LoRACallback(r=2, alpha=4, verbose=False)
        >>> trainer = Trainer(callbacks=[lora], enable_checkpointing=False, **options, **quiet)
        >>> trainer.fit(BoringModel())
        >>> lora.plan.trainable_parameters  # BoringModel is one Linear(32, 2)
        68
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        bias: str = "none",
        train_layer_norms: bool = False,
        train_embeddings: bool = False,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        modules_to_save: str | list[str] | None = "auto",
        use_rslora: bool = False,
        use_dora: bool = False,
        freeze_A: bool = False,
        init: str = "kaiming",
        loftq_iter: int = 1,
        init_from: str | None = None,
        merge_on_fit_end: bool = True,
        merge_from: str = "last",
        merge_base: str = "dequantized",
        export_dir: str | None = None,
        frozen_dtype: str | None = None,
        init_batches: int = 16,
        exact_resume: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        problems = callback_problems(
            init_from=init_from,
            merge_on_fit_end=merge_on_fit_end,
            merge_from=merge_from,
            merge_base=merge_base,
            export_dir=export_dir,
            frozen_dtype=frozen_dtype,
            init_batches=init_batches,
            exact_resume=exact_resume,
            verbose=verbose,
        )
        try:
            self.config = LoRAConfig(
                r=r,
                alpha=alpha,
                dropout=dropout,
                target_modules=target_modules,
                exclude_modules=exclude_modules,
                layers_to_transform=layers_to_transform,
                layers_pattern=layers_pattern,
                rank_pattern=rank_pattern,
                alpha_pattern=alpha_pattern,
                bias=bias,
                train_layer_norms=train_layer_norms,
                train_embeddings=train_embeddings,
                trainable_token_indices=trainable_token_indices,
                modules_to_save=modules_to_save,
                use_rslora=use_rslora,
                use_dora=use_dora,
                freeze_A=freeze_A,
                init=init,
                loftq_iter=loftq_iter,
            )
        except SettingsError as error:
            problems = [*error.problems, *problems]
        if problems:
            raise SettingsError(problems)
        self.init_batches = init_batches
        self.frozen_dtype = check_dtype(frozen_dtype)
        self.merge_base = merge_base
        self.init_from = init_from
        self.merge_on_fit_end = merge_on_fit_end
        self.merge_from = merge_from
        self.export_dir = export_dir
        self.verbose = verbose
        self.plan: Plan | None = None
        self.merge_report: MergeReport | None = None
        self.exported: dict[str, Path] = {}
        self._resume = ExactResume() if exact_resume else None
        # Known once the callback is attached to a strategy.
        self._sharding: Replicated
        self._trainer: Trainer | None = None
        self._fitted = False
        self._gradients_seen = False
        self._stays_merged = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer)
        check_frozen_dtype(trainer, self.frozen_dtype)
        self._trainer = trainer
        if stage == "fit":
            self._fitted = False
            if self._resume is not None:
                self._resume.install(trainer)
        self._attach(trainer.strategy)
        built_later = is_overridden("configure_model", pl_module) or is_overridden(
            "setup", pl_module
        )
        check_weight_averaging(trainer, self, built_later, self._sharding.is_sharded)
        if not built_later:
            self._prepare(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.plan is not None
        # Sync-BatchNorm conversion and precision plugins replace modules or flags on the way here.
        freeze(pl_module, self.plan)
        check_optimizers(trainer, pl_module)
        check_finetuning(trainer)
        self._gradients_seen = False
        if self.merge_from == "best":
            check_best_checkpoint(trainer)
            check_hyperparameters(pl_module)
        if self.export_dir is not None:
            announce_export(pl_module, self._sharding, Path(self.export_dir))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_modes(pl_module, self.config.dropout)
        if self.config.init == "eva" and self.config.r and not resumes(trainer):
            batches, sharded = self.init_batches, self._sharding.is_sharded
            initialize_from_first_batches(trainer, pl_module, batches, sharded)
            average_from(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # After all hooks at the start of the epoch, one of which may have unfrozen the base.
        if batch_idx == 0:
            refuse_unfrozen(pl_module, require_injection(pl_module).plan)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        check_loss(loss)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._gradients_seen:
            self._gradients_seen = check_gradients(pl_module, optimizer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = require_injection(pl_module)
        if trainer.current_epoch == 0 and trainer.global_step and not self._sharding.is_sharded:
            check_training(pl_module, record.plan)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fitted = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._resume is not None:
            self._resume.uninstall()
        # After an exception in a fit on_fit_end has not run, and the model is left as it was.
        if not self._fitted or injection_of(pl_module) is None:
            return
        if stage == "fit" and self.merge_from == "best":
            load_best(trainer, pl_module, self._sharding)
        if self.merge_on_fit_end and not require_injection(pl_module).merged:
            self.merge_report = self._sharding.merge(pl_module)
            shown = self.verbose and stage == "fit" and trainer.is_global_zero
            if shown and self.merge_report.errors:
                import rich

                rich.print(self.merge_report)
        if stage == "fit" and self.export_dir is not None:
            self.exported = export_model(
                pl_module,
                Path(self.export_dir),
                trainer,
                self._sharding,
                best=self.merge_from == "best",
            )
        trainer.strategy.barrier("LoRACallback.teardown")

    @contextmanager
    def staying_merged(self, model: LightningModule) -> Iterator[None]:
        """Stages in here run the merged model; for `validate_merged`."""
        was_merged = require_injection(model).merged
        self._sharding.merge(model)
        self._stays_merged = True
        try:
            yield
        finally:
            self._stays_merged = False
            if not was_merged:
                self._sharding.unmerge(model)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._resume is None or self._trainer is None:
            return {}
        return {"resume": self._resume.state_dict(self._trainer)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._resume is not None and "resume" in state_dict:
            self._resume.load_state_dict(state_dict["resume"])

    def _prepare(self, model: LightningModule) -> None:
        """Bring the model into the state that a stage starts from: adapted, unmerged, frozen."""
        forget_rebuilt(model)
        if injection_of(model) is None:
            assert self._trainer is not None
            strategy = self._trainer.strategy
            self.plan = adapt(model, self.config, strategy, self.merge_base)
            self._cast_frozen(model)
            if self.verbose and self._trainer.is_global_zero:
                import rich

                rich.print(self.plan)
        else:
            self.plan = inject_lora(model, self.config)
            if not self._stays_merged:
                self._sharding.unmerge(model)
                require_injection(model).merge_base = self.merge_base
                self._cast_frozen(model)
            freeze(model, self.plan)

    def _start(self, model: LightningModule) -> None:
        """Load what the fit starts from, before a finder runs a fit of its own."""
        assert self._trainer is not None
        if self._trainer.state.fn != TrainerFn.FITTING:
            return
        record = require_injection(model)
        if self.init_from is not None and record.fresh and not resumes(self._trainer):
            state = starting_state(model, self.init_from)
            self._sharding.load_state(model, state, self.init_from)
            average_from(self._trainer, model)
        record.fresh = False

    def _cast_frozen(self, model: LightningModule) -> None:
        if self.frozen_dtype is not None:
            cast_frozen(model, self.frozen_dtype)

    def _attach(self, strategy: Strategy) -> None:
        attached, attachment = strategy.__dict__.get("_lightning_lora", (None, None))
        if attached is self:
            return
        assert self._trainer is not None
        if attached in self._trainer.callbacks:  # type: ignore[attr-defined]
            raise ConfigError("The Trainer has two LoRACallbacks; give it one.")
        if attachment is None:
            attachment = Attachment(strategy, self._prepare, self._check_merge, self._start)
        else:
            # The module's configure_callbacks gives another one for each stage.
            attachment.prepare, attachment.check = self._prepare, self._check_merge
            attachment.start = self._start
            self._fitted = self._fitted or attached._fitted
        strategy._lightning_lora = (self, attachment)  # type: ignore[attr-defined]
        self._sharding = attachment.sharding

    def _check_merge(self, model: LightningModule) -> None:
        if not (self.merge_on_fit_end or self.export_dir is not None):
            return
        self._sharding.check_merge(model)
        if self.merge_base == "original":
            # Before a fit whose end would find out.
            with merging_into(model, self.merge_base):
                pass
