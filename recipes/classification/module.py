"""Text classification with a pretrained Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.recipes.classification.metrics import build_metrics, metric_names, mode_of
from lightning_lora.recipes.classification.predictions import ClassPredictionWriter
from lightning_lora.recipes.classification.problems import (
    REGRESSION,
    SINGLE_LABEL,
    check_problem,
    loss_of,
    predictions_of,
)
from lightning_lora.recipes.pretrained import load_model
from lightning_lora.recipes.recipe import RecipeModule

_NOT_INPUTS = ("row", "labels")


class TextClassifier(RecipeModule):
    """A pretrained model with a classification head, for texts or pairs of texts.

    It takes the batches of `ClassificationDataModule` and `GlueDataModule`: one class a row,
    several (multi-label), or a number (regression). What the settings leave open comes from the
    data at the first fit and is kept in the checkpoint's hyperparameters.

    Args:
        model_name_or_path: Hub name, local folder, or `bundled:quickstart`.
        class_names: The classes in the order of the model's outputs; by default those of the
            training data.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`;
            by default the data's.
        metrics: What is reported, the first of which chooses the best checkpoint; by default the
            data's, or accuracy and macro F1 (single label), F1 and exact match (multi-label),
            Pearson and Spearman correlation and squared error (regression).
        label_smoothing: Share of each label that is spread over all classes in training.
        **kwargs: As for `RecipeModule`.

    Attributes:
        confusion: For `val` and `test` the counts `[classes, classes]` of the latest evaluation,
            true classes by row and predicted ones by column, where each row has one class.

    Example:
        >>> classifier = TextClassifier("bundled:quickstart", class_names=["no", "yes"])
        >>> classifier.class_names
        ['no', 'yes']
    """

    def __init__(
        self,
        model_name_or_path: str,
        class_names: list[str] | None = None,
        problem_type: str | None = None,
        metrics: list[str] | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name_or_path, **kwargs)
        if problem_type is not None:
            check_problem(problem_type, "model.problem_type")
        if metrics is not None and problem_type is not None:
            metric_names(metrics, problem_type)
        self.evaluations: list[str] = ["val", "test"]
        self.confusion: dict[str, torch.Tensor] = {}

    @property
    def class_names(self) -> list[str] | None:
        """The classes in the order of the model's outputs; None until they are known."""
        return self.hparams["class_names"]

    @property
    def problem_type(self) -> str:
        """What kind of labels the model predicts."""
        return self.hparams["problem_type"] or SINGLE_LABEL

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that are reported."""
        return metric_names(self.hparams["metrics"], self.problem_type)

    @property
    def monitor(self) -> str:
        """The metric that the best checkpoint is chosen by."""
        return f"val/{self.metrics[0]}"

    @property
    def monitor_mode(self) -> str:
        """Whether the best value of that metric is the smallest or the largest."""
        return mode_of(self.metrics[0])

    def adopt(self, datamodule: Any) -> None:
        """Take from the data what the settings leave open.

        Args:
            datamodule: May have `problem_type`, `metrics` and `class_names`.

        Raises:
            ConfigError: If the settings name another problem type than the data, or a metric that
                the problem has not.
        """
        theirs = getattr(datamodule, "problem_type", None)
        ours = self.hparams["problem_type"]
        if ours and theirs and ours != theirs:
            raise ConfigError(
                f"model.problem_type is {ours}, and the data are for {theirs} (data.problem_type). "
                "Set both alike, or leave the model's out."
            )
        for name in ("problem_type", "metrics", "class_names"):
            found = getattr(datamodule, name, None)
            if self.hparams[name] is None and found:
                self.hparams[name] = list(found) if isinstance(found, list) else found
        metric_names(self.hparams["metrics"], self.problem_type)
        extra = [f"val_{name}" for name in getattr(datamodule, "extra_validation", ())]
        self.evaluations = ["val", *extra, "test"]

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and take from the data what is not known yet.

        Raises:
            ConfigError: If neither the settings nor the data have class names.
        """
        super().setup(stage)
        self.adopt(self.datamodule)
        if self.class_names is None and self.problem_type != REGRESSION:
            raise ConfigError(
                "The class names are not known. Give the checkpoint to use (--ckpt_path), or "
                "data.train_file to read them from, or set model.class_names."
            )

    def configure_model(self) -> None:
        """Build the model and its metrics, once."""
        if self.model is not None:
            return
        super().configure_model()
        classes = len(self.class_names or [None])
        self.scores = torch.nn.ModuleDict(
            {
                evaluation: build_metrics(self.metrics, self.problem_type, classes).clone(
                    prefix=f"{evaluation}/"
                )
                for evaluation in self.evaluations
            }
        )
        if self.problem_type == SINGLE_LABEL:
            self.confusion_counts = torch.nn.ModuleDict(
                {name: MulticlassConfusionMatrix(classes) for name in ("val", "test")}
            )

    def build_model(self) -> Any:
        """Return the pretrained model with a head for the classes."""
        names, options = self.class_names, self.load_options()
        if self.problem_type == REGRESSION:
            options["num_labels"] = 1
        elif names is None:
            raise ConfigError("Set model.class_names: the model is built for them.")
        else:
            options["id2label"] = dict(enumerate(names))
            options["label2id"] = {name: number for number, name in enumerate(names)}
        return load_model(
            "AutoModelForSequenceClassification",
            self.hparams["model_name_or_path"],
            problem_type=self.problem_type,
            **options,
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits `[rows, classes]` of a batch in fp32; `[rows, 1]` of a regression."""
        inputs = {name: values for name, values in batch.items() if name not in _NOT_INPUTS}
        return self.model(**inputs).logits.float()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        smoothing = self.hparams["label_smoothing"]
        loss = loss_of(self.problem_type, self(batch), batch["labels"], smoothing)
        self.log_training(loss, len(batch["labels"]))
        return loss

    def validation_step(
        self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch of the validation data, or of a further validation set."""
        self._score(batch, self.evaluations[dataloader_idx])

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Score a batch of the test data."""
        self._score(batch, "test")

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        """Return the rows' numbers and the probability of each class, or the predicted values."""
        predicted = predictions_of(self.problem_type, self(batch)).cpu()
        name = "values" if self.problem_type == REGRESSION else "probabilities"
        return {"row": batch["row"].cpu(), name: predicted}

    def on_validation_epoch_end(self) -> None:
        """Keep the confusion matrix of the validation data."""
        self._keep_confusion("val")

    def on_test_epoch_end(self) -> None:
        """Keep the confusion matrix of the test data."""
        self._keep_confusion("test")

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
                "out, or read them with "
                "lightning_lora.recipes.classification.labels.class_names_in_checkpoint."
            )

    def prediction_writer(self, path: str | Path) -> Callback:
        """Return the callback that writes this model's predictions to a file."""
        return ClassPredictionWriter(path)

    def _score(self, batch: dict[str, torch.Tensor], evaluation: str) -> None:
        logits, labels = self(batch), batch["labels"]
        options: dict[str, Any] = {"batch_size": len(labels), "add_dataloader_idx": False}
        loss = loss_of(self.problem_type, logits, labels)
        self.log(
            f"{evaluation}/loss", loss, prog_bar=evaluation == "val", sync_dist=True, **options
        )
        predicted = predictions_of(self.problem_type, logits)
        targets = labels.int() if labels.ndim > 1 else labels
        scores: Any = self.scores[evaluation]
        scores.update(predicted, targets)
        self.log_dict(scores, prog_bar=True, **options)
        if self.problem_type == SINGLE_LABEL and evaluation in self.confusion_counts:
            self.confusion_counts[evaluation].update(predicted, targets)  # type: ignore[operator]

    def _keep_confusion(self, evaluation: str) -> None:
        if self.problem_type == SINGLE_LABEL:
            counts: Any = self.confusion_counts[evaluation]
            self.confusion[evaluation] = counts.compute().cpu()
            counts.reset()
