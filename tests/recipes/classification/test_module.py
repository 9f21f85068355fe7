"""The classifier: learns, keeps its classes in checkpoints, predicts into files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_lora import LoRACallback, load_lightning_module
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.recipes import ClassificationDataModule, TextClassifier
from lightning_lora.recipes.classification.labels import class_names_in_checkpoint
from lightning_lora.recipes.classification.predictions import (
    ClassPredictionWriter,
    write_predictions,
)
from lightning_lora.recipes.pretrained import load_tokenizer


def _data(folder: Path, *splits: str, **settings: Any) -> ClassificationDataModule:
    files = {f"{split}_file": str(folder / f"{split}.csv") for split in splits}
    return ClassificationDataModule(**files, **settings)


def _trainer(*callbacks: Any, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[LoRACallback(verbose=False), *callbacks], **{**defaults, **settings})


@pytest.fixture(scope="module")
def fitted(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier that has learnt the data, its trainer and its checkpoint."""
    seed_everything(1)
    model = TextClassifier(str(tiny_model), learning_rate=2e-2)
    data = _data(tiny_data, "train", "validation", "test", batch_size=16)
    trainer = _trainer(max_epochs=12)
    trainer.fit(model, data)
    path = tmp_path_factory.mktemp("fitted") / "model.ckpt"
    metrics = dict(trainer.callback_metrics)
    trainer.save_checkpoint(path)
    return model, metrics, path


def test_it_learns_and_logs(fitted: Any) -> None:
    _, metrics, _ = fitted
    assert set(metrics) == {"train/loss", "lr", "val/loss", "val/accuracy", "val/f1"}
    assert metrics["val/accuracy"] > 0.9
    assert metrics["val/f1"] > 0.9


def test_the_checkpoint_holds_class_names_and_primitives_only(fitted: Any) -> None:
    _, _, path = fitted
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["class_names"] == ["neg", "neutral", "pos"]
    assert "optimizer" not in saved["hyper_parameters"]
    assert not any("scores" in key for key in saved["state_dict"])


def test_a_new_trainer_scores_the_checkpoint_alike(
    fitted: Any, tiny_model: Path, tiny_data: Path
) -> None:
    _, metrics, path = fitted
    model = TextClassifier(str(tiny_model), class_names=class_names_in_checkpoint(path))
    data = _data(tiny_data, "validation")
    (scores,) = _trainer().validate(model, data, ckpt_path=path, verbose=False)
    assert scores["val/loss"] == pytest.approx(float(metrics["val/loss"]), abs=1e-5)


def test_the_checkpoint_loads_without_a_trainer(fitted: Any) -> None:
    _, _, path = fitted
    model = load_lightning_module(TextClassifier, path)
    assert model.class_names == ["neg", "neutral", "pos"]
    inputs = dict(model.tokenizer(["a plot the film superb film"], return_tensors="pt"))
    with torch.no_grad():
        assert int(model(inputs).argmax()) == 2


def test_other_class_names_than_the_checkpoints_are_refused(
    fitted: Any, tiny_model: Path, tiny_data: Path
) -> None:
    _, _, path = fitted
    model = TextClassifier(str(tiny_model), class_names=["pos", "neutral", "neg"])
    with pytest.raises(CheckpointError, match="trained on the classes neg, neutral, pos"):
        _trainer().validate(model, _data(tiny_data, "validation"), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predictions_are_written_in_the_order_of_the_data(
    fitted: Any, tiny_model: Path, tiny_data: Path, tmp_path: Path, suffix: str
) -> None:
    _, _, path = fitted
    output = tmp_path / "new" / f"predictions.{suffix}"
    model = TextClassifier(str(tiny_model), class_names=class_names_in_checkpoint(path))
    trainer = _trainer(model.prediction_writer(output))
    data = _data(tiny_data, "predict", batch_size=3)
    trainer.predict(model, data, ckpt_path=path, return_predictions=False)
    with output.open(encoding="utf-8") as stream:
        if suffix == "csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
        else:
            rows = [json.loads(line) for line in stream]
    with (tiny_data / "predict.csv").open(encoding="utf-8") as stream:
        texts = [row["text"] for row in csv.DictReader(stream)]
    assert [row["text"] for row in rows] == texts
    names = ["neg", "neutral", "pos"]
    assert [row["predicted_label"] for row in rows] == [names[i % 3] for i in range(7)]
    for row in rows:
        shares = row.get("probabilities") or {n: float(row[f"probability_{n}"]) for n in names}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert max(shares, key=shares.__getitem__) == row["predicted_label"]
    assert [found.name for found in output.parent.iterdir()] == [output.name]


def test_rows_are_written_in_order_whatever_order_they_come_in(tmp_path: Path) -> None:
    probabilities = {2: [0.1, 0.9], 0: [0.8, 0.2], 1: [0.6, 0.4]}
    columns = {"text": ["p", "q", "r"]}
    write_predictions(tmp_path / "a.csv", columns, probabilities, ["x", "y"])
    rows = list(csv.reader((tmp_path / "a.csv").open()))[1:]
    assert [row[:2] for row in rows] == [["p", "x"], ["q", "x"], ["r", "y"]]


def test_predictions_go_to_files_of_a_known_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        ClassPredictionWriter(tmp_path / "a.xlsx")


def test_the_model_is_built_once_and_in_training_mode(tiny_model: Path) -> None:
    model = TextClassifier(
        str(tiny_model), ["a", "b"], gradient_checkpointing=True, dtype="bfloat16"
    )
    model.configure_model()
    built = model.model
    model.configure_model()
    assert model.model is built
    assert built.training
    assert built.is_gradient_checkpointing
    assert built.dtype is torch.bfloat16
    assert built.config.id2label == {0: "a", 1: "b"}


def test_a_head_for_other_classes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    first = TextClassifier(str(tiny_model), ["a", "b"])
    first.configure_model()
    first.model.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
    again = TextClassifier(str(tmp_path), ["a", "b"])
    again.configure_model()
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)
    with pytest.raises(ConfigError, match=r"classifier\.bias, classifier\.weight in other shapes"):
        TextClassifier(str(tmp_path), ["a", "b", "c"]).configure_model()


def test_models_that_cannot_be_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def message(name: str) -> str:
        with pytest.raises(ConfigError) as caught:
            TextClassifier(name, ["a", "b"]).configure_model()
        return str(caught.value)

    assert "did you mean 'bert'?" in message(str(tiny_model.parent / "brt"))
    assert "holds no config.json" in message(str(tmp_path))
    assert "HF_HUB_OFFLINE" in message("no-such-owner/no-such-model")
    assert "Nothing called bundled:quikstart" in message("bundled:quikstart")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "cannot be loaded" in message(str(tmp_path))
    assert "give one of auto, float32" in _dtype_message(tiny_model)


def _dtype_message(tiny_model: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        TextClassifier(str(tiny_model), dtype="flaot32")
    return str(caught.value)


def test_without_class_names_the_ways_to_them_are_named(tiny_model: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ckpt_path.*data\.train_file.*class_names"):
        _trainer().predict(TextClassifier(str(tiny_model)), _data(tiny_data, "predict"))
