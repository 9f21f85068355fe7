"""Several labels a row: in lists, in text with a separator, or in columns of 0 and 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_lora import LoRACallback
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes import ClassificationDataModule, TextClassifier
from lightning_lora.recipes.classification.label_sets import encode_label_sets, read_set_names
from lightning_lora.recipes.files import Table

MULTI = "multi_label_classification"


@pytest.mark.parametrize(
    "labels",
    [["joy|fear", "", "fear"], [["joy", "fear"], [], ["fear"]], ['["joy", "fear"]', None, "fear"]],
)
def test_labels_of_every_form_give_the_same_flags(labels: list[Any]) -> None:
    table = Table("a", {"label": labels})
    names = read_set_names(table, "label", "|")
    assert names == ["fear", "joy"]
    assert encode_label_sets(table, "label", names, "|") == [[1, 1], [0, 0], [1, 0]]


def test_columns_of_zero_and_one() -> None:
    table = Table("a", {"joy": ["1", "0"], "fear": [True, "false"]})
    columns = ["joy", "fear"]
    assert read_set_names(table, columns, "|") == columns
    assert encode_label_sets(table, columns, columns, "|") == [[1, 1], [0, 0]]
    with pytest.raises(DataError, match="row 1: the column 'joy' holds 'maybe' where 0 or 1"):
        encode_label_sets(Table("a", {"joy": ["maybe"]}), ["joy"], ["joy"], "|")


def test_unknown_labels_are_placed_and_explained() -> None:
    table = Table("a.csv", {"label": ["joy", "joy, fear"]}, [2, 3], "line")
    with pytest.raises(
        DataError, match=r"a.csv, line 3: unknown label 'joy, fear'.*label_separator"
    ):
        encode_label_sets(table, "label", ["joy", "fear"], "|")
    with pytest.raises(DataError, match="holds no label"):
        read_set_names(Table("a", {"label": ["", None]}), "label", "|")


def test_several_label_columns_need_the_problem_type() -> None:
    with pytest.raises(ConfigError, match=f"need problem_type {MULTI}"):
        ClassificationDataModule(label_column=["a", "b"])


def test_it_learns_several_labels_and_writes_them(tiny_model: Path, tmp_path: Path) -> None:
    good, bad = ["good", "great", "lovely"], ["dull", "poor", "awful"]
    rows = []
    for n in range(48):
        first, second = n % 2 == 0, n % 3 == 0
        text = f"the {good[n % 3] if first else 'plot'} film {bad[n // 3 % 3] if second else 'was'}"
        labels = [name for name, has in (("praise", first), ("blame", second)) if has]
        rows.append({"text": text, "label": labels})
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    model = TextClassifier(str(tiny_model), learning_rate=8e-3)
    data = ClassificationDataModule(
        train_file=str(file),
        validation_file=str(file),
        predict_file=str(file),
        problem_type=MULTI,
        batch_size=8,
    )
    trainer = Trainer(**options, max_epochs=30, callbacks=[LoRACallback(verbose=False)])
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/exact_match"] > 0.9
    assert model.class_names == ["blame", "praise"]
    assert model.model.config.problem_type == MULTI
    writer = model.prediction_writer(tmp_path / "out.jsonl")
    trainer = Trainer(**options, callbacks=[LoRACallback(verbose=False), writer])
    trainer.predict(model, data)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    right = [
        set(a["predicted_labels"]) == set(r["label"]) for a, r in zip(answers, rows, strict=True)
    ]
    assert sum(right) / len(right) > 0.9
    assert torch.tensor([list(a["probabilities"].values()) for a in answers]).sum(1).max() > 1.2
