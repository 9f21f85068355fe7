"""The module: it learns, and keeps its threshold wherever its weights are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, load_lightning_module
from lightning_lora.errors import ConfigError
from lightning_lora.recipes.question_answering import QuestionAnswerer
from tests.recipes.question_answering.material import LORA, WORST, make_data, make_trainer


def test_it_learns_to_point_at_answers(fitted_v1: Any) -> None:
    _, metrics, _, _ = fitted_v1
    assert set(metrics) == {"train/loss", "lr", "val/loss", "val/exact_match", "val/f1"}
    # A third would be right if the kind of the question were not understood.
    assert metrics["val/exact_match"] > 85
    assert metrics["val/f1"] >= metrics["val/exact_match"]
    assert metrics["val/loss"] < 1


def test_it_learns_when_there_is_no_answer(fitted_v2: Any) -> None:
    _, metrics, _, thresholds = fitted_v2
    kinds = {
        f"val/{kind}_answer_{name}" for kind in ("has", "no") for name in ("exact_match", "f1")
    }
    assert kinds < set(metrics)
    # Always "no answer", and always the right answer, would both be at about half.
    assert metrics["val/f1"] > 70
    assert metrics["val/has_answer_f1"] > 55 and metrics["val/no_answer_f1"] > 55
    assert metrics["val/f1"] >= metrics["val/f1_at_zero"]
    assert metrics["val/has_answer_ap"] > 75
    assert metrics["val/threshold"] == pytest.approx(thresholds[-1], rel=1e-6)
    assert len(set(thresholds)) > 6, "it is found anew by each validation"


def test_each_checkpoint_holds_the_threshold_of_its_weights(fitted_v2: Any) -> None:
    _, _, folder, thresholds = fitted_v2
    saved = {
        name: torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("worst", "last")
    }
    assert saved["worst"]["epoch"] < saved["last"]["epoch"] == len(thresholds) - 1
    for checkpoint in saved.values():
        assert checkpoint["question_answering"] == {
            "threshold": thresholds[checkpoint["epoch"]],
            "no_answer": True,
        }
        assert not any("threshold" in key for key in checkpoint["state_dict"])


@pytest.mark.parametrize("name", ["worst", "last"])
def test_testing_uses_the_threshold_of_the_checkpoint(
    fitted_v2: Any, qa_model: Path, qa_data: Path, name: str
) -> None:
    _, _, folder, thresholds = fitted_v2
    epoch = torch.load(folder / f"{name}.ckpt", weights_only=True)["epoch"]
    model = QuestionAnswerer(str(qa_model))
    data = make_data(qa_data, "v2", "test", batch_size=7)
    (scores,) = make_trainer().test(model, data, ckpt_path=folder / f"{name}.ckpt", verbose=False)
    assert model.threshold == thresholds[epoch] != 0
    assert scores["test/threshold"] == pytest.approx(model.threshold, rel=1e-6)
    # For information, what a threshold found on the test data would give.
    assert scores["test/best_f1"] >= scores["test/f1"]
    assert scores["test/best_f1_threshold"] != pytest.approx(model.threshold)
    assert {"test/best_exact_match", "test/best_exact_match_threshold", "test/loss"} < set(scores)
    if name == "last":
        assert scores["test/f1"] > 70


def test_validation_in_a_new_process_finds_the_same(
    fitted_v2: Any, qa_model: Path, qa_data: Path
) -> None:
    _, metrics, folder, thresholds = fitted_v2
    model = QuestionAnswerer(str(qa_model))
    data = make_data(qa_data, "v2", "validation", batch_size=5, group_by_length=False)
    (scores,) = make_trainer().validate(model, data, ckpt_path=folder / "last.ckpt", verbose=False)
    for name, value in scores.items():
        assert value == pytest.approx(metrics[name], abs=1e-3), name
    assert model.threshold == pytest.approx(thresholds[-1], abs=1e-4)


def test_a_sanity_check_settles_no_threshold(qa_model: Path, qa_data: Path) -> None:
    model = QuestionAnswerer(str(qa_model))
    trainer = make_trainer(max_epochs=1, check_val_every_n_epoch=2, limit_train_batches=2)
    validated: list[float] = []

    def follow() -> None:
        QuestionAnswerer.on_validation_epoch_end(model)
        validated.append(float(model.trainer.callback_metrics["val/threshold"]))

    model.on_validation_epoch_end = follow  # type: ignore[method-assign]
    trainer.fit(model, make_data(qa_data, "v2", "train", "validation"))
    assert len(validated) == 1 and validated[0] != 0.0
    assert model.threshold == 0.0


def test_the_checkpoint_loads_without_a_trainer(fitted_v2: Any) -> None:
    _, _, folder, thresholds = fitted_v2
    model = load_lightning_module(QuestionAnswerer, folder / "last.ckpt")
    assert model.threshold == thresholds[-1]
    assert model.allows_no_answer


def test_an_exported_model_keeps_the_threshold(fitted_v2: Any, tmp_path: Path) -> None:
    model, _, _, thresholds = fitted_v2
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = QuestionAnswerer(str(tmp_path))
    again.configure_model()
    assert again.threshold == thresholds[-1]
    assert again.allows_no_answer


def test_merged_weights_of_a_checkpoint_come_with_its_threshold(
    qa_model: Path, qa_data: Path, tmp_path: Path
) -> None:
    seed_everything(1)
    model = QuestionAnswerer(str(qa_model), learning_rate=5e-3)
    saver = ModelCheckpoint(tmp_path, **WORST)
    lora = LoRACallback(**LORA, merge_from="best", export_dir=str(tmp_path))
    trainer = Trainer(
        callbacks=[lora, saver],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=3,
    )
    trainer.fit(model, make_data(qa_data, "v2", "train", "validation"))
    saved = torch.load(tmp_path / "worst.ckpt", weights_only=True)
    assert saved["epoch"] < 2
    threshold = saved["question_answering"]["threshold"]
    assert threshold != pytest.approx(float(trainer.callback_metrics["val/threshold"]))
    assert model.threshold == threshold
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["no_answer_threshold"] == threshold


def test_what_cannot_be_run_is_refused(qa_model: Path, qa_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.n_best is 0"):
        QuestionAnswerer(str(qa_model), n_best=0)
    with pytest.raises(ConfigError, match=r"model\.max_answer_length is -1"):
        QuestionAnswerer(str(qa_model), max_answer_length=-1)
    from transformers import BartConfig, BartModel

    small: dict[str, Any] = {
        f"{side}_{name}": 2
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads", "ffn_dim")
    }
    BartModel(BartConfig(vocab_size=20, d_model=4, **small)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="encoder"):
        QuestionAnswerer(str(tmp_path)).configure_model()
    model = QuestionAnswerer(str(qa_model))
    model.configure_model()

    class Headless(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return {"start_top_log_probs": 1}

    model.model = Headless()
    with pytest.raises(ConfigError, match="Headless does not score each token"):
        model({"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_loaders_without_the_data_module_are_refused(qa_model: Path, qa_data: Path) -> None:
    data = make_data(qa_data, "v1", "validation", tokenizer=str(qa_model))
    data.setup("validate")
    with pytest.raises(ConfigError, match="give the Trainer a QuestionAnsweringDataModule"):
        make_trainer().validate(
            QuestionAnswerer(str(qa_model)), data.val_dataloader(), verbose=False
        )
