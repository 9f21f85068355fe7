"""Extractive question answering with a pretrained Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.pretrained import load_model
from lightning_lora.recipes.question_answering.batches import INPUTS
from lightning_lora.recipes.question_answering.decoding import (
    Records,
    decode,
    gather_records,
    span_losses,
    window_records,
)
from lightning_lora.recipes.question_answering.metrics import evaluate, evaluate_with_no_answers
from lightning_lora.recipes.question_answering.predictions import AnswerWriter
from lightning_lora.recipes.question_answering.questions import Questions
from lightning_lora.recipes.question_answering.windows import NO_LABEL
from lightning_lora.recipes.recipe import RecipeModule

_STATE = "question_answering"
# In the config of an exported model, so that it answers as its checkpoint does.
_THRESHOLD = "no_answer_threshold"


class QuestionAnswerer(RecipeModule):
    """A pretrained model that points at the answer's first and last token in a context.

    It takes the batches of `QuestionAnsweringDataModule`, and scores exact match and F1 in per
    cent as SQuAD's scripts do. Where questions may have no answer, each validation finds the
    threshold with the best F1 over all validation questions: "no answer" is the answer where its
    score lies more than that above the best answer's. The threshold is kept in every checkpoint
    and in the exported model's config; `test` and `predict` use it as it is.

    Args:
        model_name_or_path: Hub name or local folder.
        n_best: How many answers of a question are kept.
        max_answer_length: Tokens of an answer at most.
        **kwargs: As for `RecipeModule`.

    Attributes:
        threshold: How much "no answer" must score above the best answer; 0 before any validation.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> QuestionAnswerer("FacebookAI/roberta-base", max_answer_length=20).threshold
        0.0
    """

    monitor = "val/f1"
    monitor_mode = "max"
    predictions_suffix = ".json"

    def __init__(
        self, model_name_or_path: str, n_best: int = 20, max_answer_length: int = 30, **kwargs: Any
    ) -> None:
        super().__init__(model_name_or_path, **kwargs)
        for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
            if value < 1:
                raise ConfigError(f"model.{name} is {value}, not at least 1.")
        self.threshold = 0.0
        self._trained_for_no_answer = False
        self._records: list[Records] = []

    @property
    def allows_no_answer(self) -> bool:
        """Whether questions may have no answer: what the data say, else what was trained on."""
        stated = getattr(self.datamodule, "allows_no_answer", None)
        return self._trained_for_no_answer if stated is None else stated

    def build_model(self) -> Any:
        """Return the model with its head."""
        name = self.hparams["model_name_or_path"]
        model = load_model("AutoModelForQuestionAnswering", name, **self.load_options())
        stored = getattr(model.config, _THRESHOLD, None)
        if stored is not None:
            self.threshold, self._trained_for_no_answer = float(stored), True
        return model

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of each token to be the answer's first and last.

        Args:
            batch: The model's inputs, each `[windows, tokens]`; other entries are left aside.

        Returns:
            Two tensors `[windows, tokens]`.

        Raises:
            ConfigError: If the model's head does not give such logits.
        """
        outputs = self.model(**{name: batch[name] for name in INPUTS if name in batch})
        start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
        if start is None or end is None:
            raise ConfigError(
                f"{type(self.model).__name__} does not score each token as the beginning and the "
                "end of an answer. Use a model whose head has start_logits and end_logits, such as "
                "BERT, RoBERTa, ELECTRA or DeBERTa."
            )
        return start, end

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean of the cross-entropies of start and end over the labelled windows."""
        labelled = (batch["start"] != NO_LABEL).sum()
        losses = span_losses(*self(batch), batch)
        loss = losses.sum() / labelled.clamp(min=1)
        self.log_training(loss, len(losses))
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Keep the best answers of a batch of windows."""
        self._records.append(self._record(batch))

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Keep the best answers of a batch of windows."""
        self._records.append(self._record(batch))

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Records:
        """Return the best answers of a batch of windows, as `window_records` describes them."""
        return self._record(batch)

    def on_validation_epoch_start(self) -> None:
        """Forget windows of an evaluation that was interrupted."""
        self._records.clear()

    def on_test_epoch_start(self) -> None:
        """Forget windows of an evaluation that was interrupted."""
        self._records.clear()

    def on_validation_epoch_end(self) -> None:
        """Score the validation questions, and find the threshold for "no answer"."""
        scores = self._evaluate("validation", None)
        if "threshold" in scores and not self.trainer.sanity_checking:
            self._keep(scores["threshold"], True)
        best = {name for name in scores if name.startswith("best_")}
        self._log_scores("val", {name: scores[name] for name in scores if name not in best})

    def on_test_epoch_end(self) -> None:
        """Score the test questions with the threshold of the last validation."""
        self._log_scores("test", self._evaluate("test", self.threshold))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the threshold in the checkpoint."""
        checkpoint[_STATE] = {"threshold": self.threshold, "no_answer": self.allows_no_answer}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the threshold of the checkpoint."""
        state = checkpoint.get(_STATE)
        if state is not None:
            self._keep(state["threshold"], state["no_answer"])

    def prediction_writer(self, path: str | Path) -> Callback:
        """Return the callback that writes this model's answers to a file."""
        return AnswerWriter(path)

    def questions(self, split: str) -> Questions:
        """Return the questions that windows of a split are from.

        Raises:
            ConfigError: If the Trainer has no data module that knows them.
        """
        if not hasattr(self.datamodule, "questions"):
            raise ConfigError(
                "Answers are cut from the contexts of the data module: give the Trainer a "
                "QuestionAnsweringDataModule."
            )
        questions: Questions = self.datamodule.questions(split)
        return questions

    def _keep(self, threshold: float, no_answer: bool) -> None:
        self.threshold, self._trained_for_no_answer = threshold, no_answer
        if no_answer and self.model is not None:
            setattr(self.model.config, _THRESHOLD, threshold)

    def _record(self, batch: dict[str, torch.Tensor]) -> Records:
        settings = self.hparams
        return window_records(
            *self(batch), batch, settings["n_best"], settings["max_answer_length"]
        )

    def _evaluate(self, split: str, threshold: float | None) -> dict[str, float]:
        """Score what was recorded; all ranks come to the same result."""
        records = gather_records(self._records, self.trainer.world_size)
        self._records.clear()
        if not records:
            return {}
        questions = self.questions(split)
        predictions = decode(records, questions.contexts, n_best=1)
        texts = [found.best for found in predictions]
        references = [questions.references[found.row] for found in predictions]
        if self.allows_no_answer:
            silences = [found.no_answer_score for found in predictions]
            scores = evaluate_with_no_answers(texts, silences, references, threshold)
        else:
            scores = evaluate(texts, references)
        losses = records["loss"][~np.isnan(records["loss"])]
        return {**scores, "loss": float(losses.mean()) if len(losses) else float("nan")}

    def _log_scores(self, stage: str, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            if name != "total":
                shown = name in ("f1", "exact_match", "loss")
                self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=1, sync_dist=True)
