"""Tiny models of the kinds that the bundled configs adapt, and tiny data in the layouts they read.

Each kind of data module has a function that writes files which fit a config's settings and returns
the arguments that put them in the place of the config's own.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.recipes.causal_lm.material import CHAT_TEMPLATE, save_model, write_pairs
from tests.recipes.question_answering.material import FILLERS, make_squad, qa_words, word_tokenizer

ROWS = {"train": 48, "validation": 12, "test": 12}


def tiny_encoder(folder: Path) -> Path:
    """Write a BERT of one layer, with its tokenizer; it takes as many tokens as the configs ask."""
    from transformers import BertConfig, BertModel

    path = folder / "bert"
    if not path.exists():
        tokenizer = word_tokenizer(qa_words())
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=512,
        )
        BertModel(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def tiny_decoder(folder: Path) -> Path:
    """Write a GPT-2 of two layers, with a tokenizer that has a chat template."""
    path = folder / "gpt2"
    return path if path.exists() else save_model(path, "gpt2", CHAT_TEMPLATE, positions=1024)


def tiny_model(settings: dict[str, Any], folder: Path) -> Path:
    """Write a model of the kind that a config's `model` section adapts.

    Args:
        settings: The section.
        folder: Where models are written, each once.

    Returns:
        The model's folder.
    """
    name = str(settings["class_path"]).rsplit(".", 1)[-1]
    write = _MODELS.get(name)
    assert write is not None, f"tests/layouts.py knows no tiny model for {name}; teach it one."
    return write(folder)


def tiny_data(settings: dict[str, Any], folder: Path) -> list[str]:
    """Write data for a config's `data` section.

    Args:
        settings: The section.
        folder: Where the files are written.

    Returns:
        Arguments of the command line that put the files in the place of the config's own.
    """
    name = str(settings["class_path"]).rsplit(".", 1)[-1]
    write = _WRITERS.get(name)
    assert write is not None, f"tests/layouts.py knows no layout for {name}; teach it one."
    return write(settings.get("init_args", {}), folder)


def _classes(settings: dict[str, Any], folder: Path) -> list[str]:
    if str(settings.get("train_file")).startswith("bundled:"):
        return []
    texts = settings.get("text_column", "text")
    texts = [texts] if isinstance(texts, str) else texts
    label = settings.get("label_column", "label")
    files = _tables(folder, ".csv", [*texts, label], len(texts), ("no", "yes", "perhaps"))
    return [*_no_dataset(), *files]


def _glue(settings: dict[str, Any], folder: Path) -> list[str]:
    from lightning_lora.recipes.classification.glue import TASKS

    task = TASKS[settings["task"]]
    names = {theirs: given for given, theirs in task.renamed}
    columns = [names.get(name, name) for name in (*task.texts, "label")]
    labels = task.classes or ("0.5", "4.25", "2.0")
    if task.header is not None:
        columns = list(task.header)
    for split in ("train", "dev", "dev_matched", "dev_mismatched"):
        rows = _rows(ROWS["train" if split == "train" else "validation"], labels)
        with (folder / f"{split}.tsv").open("w", encoding="utf-8") as stream:
            if task.header is None:
                stream.write("\t".join(columns) + "\n")
            for text, label in rows:
                number = task.classes.index(label) if label in task.classes else label
                cells = dict.fromkeys(columns, text) | {names.get("label", "label"): number}
                stream.write("\t".join(str(cells[name]) for name in columns) + "\n")
    return ["--data.data_dir", str(folder)]


def _questions(settings: dict[str, Any], folder: Path) -> list[str]:
    source = f"{settings.get('dataset')} {settings.get('train_file')} {settings.get('version_2')}"
    version_2 = any(sign in source for sign in ("v2", "True"))
    arguments = _no_dataset()
    for number, split in enumerate(ROWS):
        path = make_squad(folder / f"{split}.json", 16, number, version_2)
        arguments += [f"--data.{split}_file", str(path)]
    return arguments


def _texts(settings: dict[str, Any], folder: Path) -> list[str]:
    """Pairs with the columns that are named, or a text file."""
    arguments = _no_dataset()
    for number, (split, rows) in enumerate(ROWS.items()):
        path = write_pairs(folder / f"{split}.csv", rows, number)
        if "prompt_column" in settings:
            header = f"{settings['prompt_column']},{settings['completion_column']}"
            path.write_text(path.read_text().replace("mr,ref", header, 1))
        else:
            path = path.rename(path.with_suffix(".txt"))
        arguments += [f"--data.{split}_file", str(path)]
    return arguments


def _tables(
    folder: Path, suffix: str, columns: list[str], texts: int, labels: tuple[str, ...]
) -> list[str]:
    """Write a table for each split: so many columns of text, the others of labels."""
    arguments = []
    for split, rows in ROWS.items():
        path = folder / f"{split}{suffix}"
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            for text, label in _rows(rows, labels):
                writer.writerow([text] * texts + [label] * (len(columns) - texts))
        arguments += [f"--data.{split}_file", str(path)]
    return arguments


def _rows(count: int, labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Texts of different lengths, with each label as often as the others."""
    draw = random.Random(count)
    for row in range(count):
        yield " ".join(draw.choices(FILLERS, k=draw.randint(2, 9))), labels[row % len(labels)]


def _no_dataset() -> list[str]:
    empty = ("dataset", "dataset_config", "dataset_splits")
    return [part for name in empty for part in (f"--data.{name}", "null")]


_MODELS: dict[str, Callable[[Path], Path]] = {
    "TextClassifier": tiny_encoder,
    "QuestionAnswerer": tiny_encoder,
    "CausalLM": tiny_decoder,
}
_WRITERS: dict[str, Callable[[dict[str, Any], Path], list[str]]] = {
    "ClassificationDataModule": _classes,
    "GlueDataModule": _glue,
    "QuestionAnsweringDataModule": _questions,
    "CausalLMDataModule": _texts,
}
