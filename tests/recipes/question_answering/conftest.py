"""A tiny model for questions, and SQuAD files that it can learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.recipes.question_answering import QuestionAnswerer
from tests.recipes.question_answering.material import (
    WORST,
    make_data,
    make_squad,
    make_trainer,
    qa_words,
    word_tokenizer,
)


@pytest.fixture(scope="session")
def qa_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT that takes 32 tokens, with its tokenizer, in a folder."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("qa") / "bert"
    tokenizer = word_tokenizer(qa_words())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qa_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with v1-*.json and v2-*.json for train, validation, test and predict."""
    folder = tmp_path_factory.mktemp("squad")
    for name, version_2 in (("v1", False), ("v2", True)):
        for seed, (split, contexts) in enumerate(
            (("train", 100), ("validation", 30), ("test", 30), ("predict", 9))
        ):
            path = folder / f"{name}-{split}.json"
            make_squad(path, contexts, seed, version_2, answers=split != "predict")
    return folder


def _fit(version: str, qa_model: Path, qa_data: Path, folder: Path, epochs: int) -> Any:
    seed_everything(1)
    model = QuestionAnswerer(str(qa_model), learning_rate=5e-3)
    thresholds: list[float] = []

    class Follow(ModelCheckpoint):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                thresholds.append(pl_module.threshold)

    savers = Follow(folder, **WORST), ModelCheckpoint(folder, filename="last")
    trainer = make_trainer(*savers, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(model, make_data(qa_data, version, "train", "validation"))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return model, metrics, folder, thresholds


@pytest.fixture(scope="session")
def fitted_v1(qa_model: Path, qa_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that answers every question: itself, its metrics, the folder of its checkpoints, and
    the threshold after each validation.
    """
    return _fit("v1", qa_model, qa_data, tmp_path_factory.mktemp("v1"), 6)


@pytest.fixture(scope="session")
def fitted_v2(qa_model: Path, qa_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same of a model that also gives no answer."""
    return _fit("v2", qa_model, qa_data, tmp_path_factory.mktemp("v2"), 12)
