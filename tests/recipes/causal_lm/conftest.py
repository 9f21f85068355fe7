"""Tiny decoders in folders, and files that they can learn from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.causal_lm.material import CHAT_TEMPLATE, save_model, write_pairs


@pytest.fixture(scope="session")
def lm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer has no chat template."""
    return save_model(tmp_path_factory.mktemp("lm") / "llama", "llama")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer has a chat template."""
    return save_model(tmp_path_factory.mktemp("lm") / "chat", "llama", CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def lm_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train`, `validation` and `test`, each as .csv and .jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (split, rows) in enumerate((("train", 96), ("validation", 21), ("test", 33))):
        for suffix in ("csv", "jsonl"):
            write_pairs(folder / f"{split}.{suffix}", rows, seed)
    return folder
