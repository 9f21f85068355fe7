"""What the recipes share: a pretrained model with its tokenizer, an optimizer and a schedule."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_lora import FSDP2Strategy
from lightning_lora.recipes.optimization import build_optimizer, warmup_schedule
from lightning_lora.recipes.pretrained import dtype_of, load_tokenizer
from lightning_lora.recipes.quantization import (
    Quantization,
    QuantizationOptions,
    keep_trained_in_float32,
    lora_settings,
    precision_dtype,
)


class RecipeModule(LightningModule):
    """A pretrained Hugging Face model to be adapted; the recipes add task, loss and scores.

    Subclasses implement `build_model` and pass their settings on by keyword, so that all of them
    become hyperparameters.

    Args:
        model_name_or_path: Hub name, local folder, or `bundled:quickstart`.
        learning_rate: Highest learning rate, of AdamW.
        weight_decay: AdamW's decay of the trained matrices.
        optimizer: Another optimizer, with its own rate and decay in place of the two above.
        lr_scheduler: Another schedule, stepped every epoch, in place of the two below.
        schedule: What follows the warm-up: `linear` or `cosine` decay to zero, or `constant`.
        warmup: How long the learning rate rises: a share of the optimizer steps (0.06), a number of
            steps from 1 on (500), or epochs (`2 epochs`).
        lora_plus_ratio: Learning rate of the factors B as a multiple of that of everything else
            (LoRA+); 16 is the paper's choice.
        gradient_checkpointing: Whether activations are computed again in the backward pass, which
            saves memory and costs time.
        dtype: What the model is loaded in: `float32`, `bfloat16`, `float16`, or `auto` for what
            its weights are stored in; by default `float32`, and of a quantized base the dtype of
            the Trainer's precision.
        quantization: Keeps the base's linear layers in `nf4`, `fp4` (4 bits) or `int8` (QLoRA).
            The head, the embeddings and what else trains whole stay as they are.
        quantization_options: Finer settings, by name: `double`, `compute_dtype`, `skip_modules`
            and `threshold` (`QuantizationOptions`).
        trust_remote_code: Whether code from the hub may run.
    """

    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(
        self,
        model_name_or_path: str,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: str = "linear",
        warmup: float | str = 0.06,
        lora_plus_ratio: float | None = None,
        gradient_checkpointing: bool = False,
        dtype: str | None = None,
        quantization: str | None = None,
        quantization_options: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        # Callables in the hyperparameters would make the checkpoint unreadable for
        # torch.load(weights_only=True).
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model: Any = None
        self.tokenizer: Any = None
        dtype_of(dtype or "float32")
        QuantizationOptions.read(quantization, quantization_options)

    @property
    def datamodule(self) -> Any:
        """The trainer's data module; None where there is none, or no trainer."""
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:
            return None

    def setup(self, stage: str) -> None:
        """Load the tokenizer."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(
                self.hparams["model_name_or_path"], self.hparams["trust_remote_code"]
            )

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is not None:
            return
        self.model = self.build_model()
        if self.hparams["quantization"] is not None and str(self._precision).endswith("mixed"):
            keep_trained_in_float32(self.model, lora_settings(self._trainer))
        if self.tokenizer is not None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.hparams["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def build_model(self) -> Any:
        """Return the pretrained model with the task's head; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} does not say which model it adapts.")

    @property
    def _precision(self) -> str | None:
        return None if self._trainer is None else str(self._trainer.precision)

    @property
    def _fuses_updates(self) -> bool:
        # Under mixed precision Lightning refuses to clip gradients for fused optimizers.
        mixed = str(self._precision).endswith("mixed")
        trained = [p for p in self.parameters() if p.requires_grad]
        return not mixed and all(p.device.type in ("cpu", "cuda") for p in trained)

    def load_options(self) -> dict[str, Any]:
        """Return what every recipe passes on to `load_model`."""
        strategy: Any = None if self._trainer is None else self._trainer.strategy
        settings = self.hparams
        options = {
            "later": isinstance(strategy, FSDP2Strategy),
            "dtype": dtype_of(settings["dtype"] or "float32"),
            "trust_remote_code": settings["trust_remote_code"],
        }
        if settings["quantization"] is None:
            return options
        if settings["dtype"] is None:
            # Kept, because packed weights depend on what they were packed from.
            computed = precision_dtype(self._precision)
            settings["dtype"] = str(computed).removeprefix("torch.")
        loaded = dtype_of(settings["dtype"])
        if self._trainer is not None:
            computed = precision_dtype(self._precision)
        else:
            computed = loaded if isinstance(loaded, torch.dtype) else torch.float32
        return {
            **options,
            "later": False,
            "dtype": loaded,
            "quantization": Quantization(
                settings["quantization"],
                QuantizationOptions.read(
                    settings["quantization"], settings["quantization_options"]
                ),
                computed,
                lora_settings(self._trainer),
            ),
            "device_map": {"": "cpu" if strategy is None else strategy.root_device},
        }

    def log_training(self, loss: torch.Tensor, count: int) -> None:
        """Log a training step.

        Args:
            loss: The step's mean loss, a scalar.
            count: What it is the mean of: rows, or tokens.
        """
        self.log("train/loss", loss, prog_bar=True, batch_size=count)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("lr", rate, prog_bar=True, logger=False, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over what is trained, and its schedule."""
        settings = self.hparams
        optimizer = build_optimizer(
            self,
            self.optimizer,
            settings["learning_rate"],
            settings["weight_decay"],
            settings["lora_plus_ratio"],
            fused=self._fuses_updates,
        )
        if self.lr_scheduler is not None:
            scheduler: Any = self.lr_scheduler(optimizer)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler = {"scheduler": scheduler, "monitor": self.monitor}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        total = self.trainer.estimated_stepping_batches
        # Also right when the fit is limited by max_steps, where max_epochs says nothing.
        batches = self.trainer.num_training_batches
        per_epoch = max(1, -(-batches // self.trainer.accumulate_grad_batches))
        scheduler = warmup_schedule(
            optimizer, settings["warmup"], total, per_epoch, settings["schedule"]
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
