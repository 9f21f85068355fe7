"""A tiny model for questions, and SQuAD files that it can learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recipes.question_answering.material import make_squad, qa_words, word_tokenizer


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
