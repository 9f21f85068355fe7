"""A tiny pretrained classifier base and data that it can learn, made once a session, offline."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Models this small lose more to waiting for threads than the threads compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared rows of tests stay out of the user's cache, in subprocesses too."""
    os.environ["LIGHTNING_LORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _inputs_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small inputs of tests go the way of larger ones; subprocesses go that of theirs."""
    monkeypatch.setattr("lightning_lora.functional.SMALL_INPUT", 0)
    monkeypatch.setattr("lightning_lora.dropout.SPARSE_FROM", 1)


WORDS = {
    "neg": ["awful", "bad", "dull", "poor"],
    "neutral": ["plain", "usual", "average", "fair"],
    "pos": ["good", "great", "lovely", "superb"],
}
FILLERS = ["the", "film", "was", "a", "really", "plot"]


# What Lightning leaves in the environment, and subprocesses would take for theirs.
_LEFT_BEHIND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """Leave no process group behind, nor the variables that would make others join it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in _LEFT_BEHIND:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT without a head, with its tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    known = [word for group in WORDS.values() for word in group]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *known]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.05,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, validation.csv and test.csv (text, label) and predict.csv (text)."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name, rows in (("train", 96), ("validation", 24), ("test", 24), ("predict", 7)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"] if name != "predict" else ["text"])
            for row in range(rows):
                label = list(WORDS)[row % 3]
                text = [*draw.sample(FILLERS, 4), draw.choice(WORDS[label]), "film"]
                writer.writerow([" ".join(text)] + ([label] if name != "predict" else []))
    return folder
