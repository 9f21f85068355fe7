"""Callbacks that average weights, beside LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor

from lightning_lora import adapter_state_dict, load_lightning_module
from lightning_lora.errors import CheckpointError, ConfigError
from tests.models import assert_same
from tests.modules import Classifier, PlainClassifier, dataset, make_lora, make_trainer

KEYS = {f"net.{layer}.lora.{factor}" for layer in (0, 3, 4) for factor in "AB"}


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.8)


def fit(folder: Path, max_epochs: int, ckpt_path: Any = None, **lora: Any) -> tuple[Any, Trainer]:
    seed_everything(0)
    model = PlainClassifier(lr=0.05)
    trainer = make_trainer(folder, make_lora(**lora), max_epochs=max_epochs, callbacks=[ema()])
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(dataset()[:][0])
    return found


def test_checkpoints_hold_the_averages_of_the_adapter_alone(tmp_path: Path) -> None:
    averages: dict[str, Tensor] = {}

    class ByHand(Callback):
        def on_train_batch_end(self, trainer: Trainer, model: Any, *_: Any) -> None:
            for name, value in adapter_state_dict(model).items():
                before = averages.get(name, value)
                averages[name] = before + (value - before) * 0.2

        def on_train_start(self, trainer: Trainer, model: Any) -> None:
            averages.update({k: v.clone() for k, v in adapter_state_dict(model).items()})

    seed_everything(0)
    trainer = make_trainer(tmp_path, make_lora(), max_epochs=2, callbacks=[ema(), ByHand()])
    trainer.fit(PlainClassifier(lr=0.05))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == KEYS
    for name, value in checkpoint["state_dict"].items():
        assert not torch.equal(value, checkpoint["current_model_state"][name])
    # The first update takes the weights as they are, after the first step.
    assert checkpoint["averaging_state"]["n_averaged"] == 16


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", 4)
    fit(tmp_path / "half", 2)
    resumed, _ = fit(tmp_path / "rest", 4, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert torch.equal(logits(resumed), logits(whole))
    files = [
        torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "rest")
    ]
    for key in ("state_dict", "current_model_state"):
        assert_same(files[0][key], files[1][key])


def test_the_averages_are_what_is_tested_merged_and_loaded(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, 3, merge_from="best")
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    loaded = load_lightning_module(PlainClassifier, checkpoint.best_model_path)
    torch.testing.assert_close(logits(model), logits(loaded))
    assert checkpoint.best_model_score is not None
    fresh = make_trainer(tmp_path / "test", make_lora())
    (scores,) = fresh.validate(PlainClassifier(), ckpt_path=checkpoint.best_model_path)
    assert scores["val_loss"] == pytest.approx(float(checkpoint.best_model_score))


@pytest.mark.parametrize("start", ["init_from", "eva"])
def test_averages_that_begin_late_are_of_what_the_fit_starts_from(
    tmp_path: Path, start: str
) -> None:
    fit(tmp_path / "first", 1)
    source = tmp_path / "first" / "last.ckpt"
    settings = {"init_from": str(source)} if start == "init_from" else {"init": "eva"}
    late = EMAWeightAveraging(decay=0.8, update_starting_at_step=1000)
    seen: dict[str, Tensor] = {}

    class See(Callback):
        def on_train_batch_start(self, trainer: Trainer, model: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                state = adapter_state_dict(model)
                seen.update({name: value.clone() for name, value in state.items()})

    lora = make_lora(**settings)
    trainer = make_trainer(tmp_path / "second", lora, max_epochs=1, callbacks=[late, See()])
    trainer.fit(PlainClassifier(lr=0.05))
    saved = torch.load(tmp_path / "second" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == seen.keys()
    for name, value in seen.items():
        assert torch.equal(saved["state_dict"][name], value)
        assert not torch.equal(saved["current_model_state"][name], value)


def test_averages_of_another_adapter_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["current_model_state"]["net.0.lora.A"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"missing: net\.0\.lora\.A"):
        fit(tmp_path / "rest", 2, ckpt_path=path)


@pytest.mark.parametrize(
    "averaging", [WeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.01)]
)
def test_what_would_copy_the_bare_model_is_refused(averaging: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    with pytest.raises(ConfigError, match="Put LoRACallback before it"):
        Trainer(callbacks=[averaging(), make_lora()], **options).fit(PlainClassifier())
    # Also where the model is there already: what is overridden could replace it.
    with pytest.raises(ConfigError, match="overrides setup or configure_model"):
        Trainer(callbacks=[make_lora(), averaging()], **options).fit(Classifier())


def test_shards_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_lora(), strategy="fsdp2", callbacks=[ema()])
    with pytest.raises(ConfigError, match=r"EMAWeightAveraging copies the whole.*'ddp'"):
        trainer.fit(PlainClassifier())
