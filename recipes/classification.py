"""Text classification with a pretrained Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.recipes.optimization import build_optimizer, warmup_linear
from lightning_lora.recipes.predictions import ClassPredictionWriter
from lightning_lora.recipes.pretrained import dtype_of, load_model, load_tokenizer


class TextClassifier(LightningModule):
    """A pretrained model with a classification head, for texts or pairs of texts.

    It takes the batches of `ClassificationDataModule`. The class names come from the data at the
    first fit and are kept in the checkpoint's hyperparameters.

    Args:
        model_name_or_path: Hub name, local folder, or `bundled:quickstart`.
        class_names: The classes in the order of the model's outputs; by default those of the
            training data.
        learning_rate: Highest learning rate, of AdamW.
        weight_decay: AdamW's decay of the trained matrices.
        optimizer: Another optimizer, with its own rate and decay in place of the two above.
        warmup: Share of the optimizer steps, or number of steps from 1 on, during which the
            learning rate rises; then it falls to zero.
        label_smoothing: Share of each label that is spread over all classes in training.
        gradient_checkpointing: Whether activations are computed again in the backward pass, which
            saves memory and costs time.
        dtype: What the model is loaded in: `float32`, `bfloat16`, `float16`, or `auto` for what
            its weights are stored in.
        trust_remote_code: Whether code from the hub may run.

    Example:
        >>> classifier = TextClassifier("bundled:quickstart", class_names=["no", "yes"])
        >>> classifier.class_names
        ['no', 'yes']
    """

    monitor = "val/accuracy"
    monitor_mode = "max"

    def __init__(
        self,
        model_name_or_path: str,
        class_names: list[str] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        optimizer: OptimizerCallable | None = None,
        warmup: float = 0.06,
        label_smoothing: float = 0.0,
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        # A callable in the hyperparameters would make the checkpoint unreadable for
        # torch.load(weights_only=True).
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer
        self.model: Any = None
        self.tokenizer: Any = None
        dtype_of(dtype)

    @property
    def class_names(self) -> list[str] | None:
        """The classes in the order of the model's outputs; None until they are known."""
        return self.hparams["class_names"]

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and take the class names from the data unless they are known.

        Raises:
            ConfigError: If neither the settings nor the data have class names.
        """
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(
                self.hparams["model_name_or_path"], self.hparams["trust_remote_code"]
            )
        if self.class_names is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            names = getattr(datamodule, "class_names", None)
            if not names:
                raise ConfigError(
                    "The class names are not known. Give the checkpoint to use (--ckpt_path), or "
                    "data.train_file to read them from, or set model.class_names."
                )
            self.hparams["class_names"] = list(names)

    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is not None:
            return
        names = self.class_names
        if names is None:
            raise ConfigError("Set model.class_names: the model is built for them.")
        self.model = load_model(
            "AutoModelForSequenceClassification",
            self.hparams["model_name_or_path"],
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            dtype=dtype_of(self.hparams["dtype"]),
            trust_remote_code=self.hparams["trust_remote_code"],
        )
        if self.tokenizer is not None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.hparams["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(names), average="micro"),
                "f1": MulticlassF1Score(len(names), average="macro"),
            }
        )
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits `[rows, classes]` of a batch in fp32."""
        inputs = {name: values for name, values in batch.items() if name not in ("row", "labels")}
        return self.model(**inputs).logits.float()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        smoothing = self.hparams["label_smoothing"]
        loss = F.cross_entropy(self(batch), batch["labels"], label_smoothing=smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("lr", rate, prog_bar=True, logger=False, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Score a batch of the validation data."""
        self._score(batch, "val", self.val_scores)

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Score a batch of the test data."""
        self._score(batch, "test", self.test_scores)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the rows' numbers and the probability of each class."""
        return {"row": batch["row"].cpu(), "probabilities": self(batch).softmax(dim=-1).cpu()}

    def configure_optimizers(self) -> Any:
        """Return the optimizer over what is trained, and its schedule."""
        optimizer = build_optimizer(
            self, self.optimizer, self.hparams["learning_rate"], self.hparams["weight_decay"]
        )
        steps = self.trainer.estimated_stepping_batches
        scheduler = warmup_linear(optimizer, self.hparams["warmup"], steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other classes.

        Raises:
            CheckpointError: If the class names differ, in name or order.
        """
        saved = checkpoint.get("hyper_parameters", {}).get("class_names")
        if saved and self.class_names and list(saved) != list(self.class_names):
            raise CheckpointError(
                f"The checkpoint was trained on the classes {', '.join(saved)}; the model has "
                f"{', '.join(self.class_names)}. Use the checkpoint's: leave model.class_names "
                "out, or read them with lightning_lora.recipes.labels.class_names_in_checkpoint."
            )

    def prediction_writer(self, path: str | Path) -> Callback:
        """Return the callback that writes this model's predictions to a file."""
        return ClassPredictionWriter(path)

    def _score(self, batch: dict[str, torch.Tensor], stage: str, scores: MetricCollection) -> None:
        logits, labels = self(batch), batch["labels"]
        loss = F.cross_entropy(logits, labels)
        self.log(
            f"{stage}/loss", loss, prog_bar=stage == "val", batch_size=len(labels), sync_dist=True
        )
        scores.update(logits, labels)
        self.log_dict(scores, prog_bar=True, batch_size=len(labels))
