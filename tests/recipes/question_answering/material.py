"""Tokenizers of whole words in the layouts of known models, and questions that a tiny model can
learn to answer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora import LoRACallback
from lightning_lora.recipes.question_answering import QuestionAnsweringDataModule

LORA: dict[str, Any] = {"bias": "all", "train_layer_norms": True, "verbose": False}
# What keeps a checkpoint of another epoch than the last, which is the best of a task this easy.
WORST: dict[str, Any] = {"filename": "worst", "monitor": "val/loss", "mode": "max"}
KINDS = {
    "who": ["ada", "bell", "curie", "dirac"],
    "where": ["rome", "oslo", "lima", "kyoto"],
    "when": ["monday", "friday", "noon", "dawn"],
}
FILLERS = ["the", "ship", "was", "seen", "near", "old", "port", "and", "left", "again", "quietly"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEMPLATES = {
    "bert": "[CLS] $A [SEP] $B:1 [SEP]:1",
    "roberta": "[CLS] $A [SEP] [SEP] $B [SEP]",
    "xlnet": "$A [SEP] $B:1 [SEP]:1 [CLS]:2",
    "gpt": "$A $B",
}


def word_tokenizer(words: list[str], template: str = "bert", **settings: Any) -> Any:
    """A fast tokenizer that knows these words and joins a pair as the template says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=TEMPLATES[template], special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "attention_mask"]
    if template != "gpt":
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if template in ("bert", "xlnet"):
        inputs.append("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=inputs,
        **{"model_max_length": 512, **special, **settings},
    )


def qa_words() -> list[str]:
    return [*KINDS, *FILLERS, *(word for words in KINDS.values() for word in words)]


def make_squad(path: Path, contexts: int, seed: int, version_2: bool, answers: bool = True) -> Path:
    """A SQuAD file. A context names up to one person, place and time among fillers; its three
    questions ask for each, and in version 2 what they ask for may be missing.
    """
    draw = random.Random(seed)
    paragraphs = []
    for number in range(contexts):
        present = [kind for kind in KINDS if not version_2 or draw.random() < 0.6]
        named = {kind: draw.choice(KINDS[kind]) for kind in present}
        words = draw.choices(FILLERS, k=draw.randint(6, 24)) + list(named.values())
        draw.shuffle(words)
        context = " ".join(words)
        questions = []
        for kind in KINDS:
            question: dict[str, Any] = {"id": f"{path.stem}-{number}-{kind}", "question": kind}
            if answers:
                found = named.get(kind)
                start = context.find(found) if found else -1
                question["answers"] = [{"text": found, "answer_start": start}] if found else []
                if version_2:
                    question["is_impossible"] = not found
            questions.append(question)
        paragraphs.append({"context": context, "qas": questions})
    articles = [{"title": "ships", "paragraphs": paragraphs}]
    path.write_text(json.dumps({"version": "v2.0" if version_2 else "1.1", "data": articles}))
    return path


def squad_file(path: Path, *paragraphs: tuple[str, list[dict[str, Any]]], **top: Any) -> str:
    """Write contexts with their questions as a SQuAD file."""
    inner = [{"context": context, "qas": questions} for context, questions in paragraphs]
    path.write_text(json.dumps({**top, "data": [{"title": "t", "paragraphs": inner}]}))
    return str(path)


def question(name: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    stated = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "who?", "answers": stated, **more}


def make_data(
    folder: Path, version: str, *splits: str, **settings: Any
) -> QuestionAnsweringDataModule:
    files = {f"{split}_file": str(folder / f"{version}-{split}.json") for split in splits}
    defaults: dict[str, Any] = {
        "max_length": 20,
        "doc_stride": 6,
        "max_question_length": 4,
        "batch_size": 16,
    }
    return QuestionAnsweringDataModule(**{**files, **defaults, **settings})


def make_trainer(*callbacks: Any, **settings: Any) -> Trainer:
    """A silent Trainer on the CPU with LoRA."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[LoRACallback(**LORA), *callbacks], **{**defaults, **settings})
