"""What every recipe's module shares: schedules in a real fit, checkpoints, refused models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_lora import LoRACallback
from lightning_lora.errors import ConfigError
from lightning_lora.recipes import ClassificationDataModule, TextClassifier
from lightning_lora.recipes.pretrained import load_tokenizer


class Rates(Callback):
    """Notes each group's learning rate at every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.seen):
            groups = trainer.optimizers[0].param_groups
            self.seen.append([group["lr"] for group in groups])


def _fit(model: TextClassifier, folder: Path, **settings: Any) -> list[list[float]]:
    data = ClassificationDataModule(
        train_file=str(folder / "train.csv"),
        validation_file=str(folder / "validation.csv"),
        batch_size=16,
    )
    rates = Rates()
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LoRACallback(verbose=False), rates],
        **options,
    )
    trainer.fit(model, data)
    return rates.seen


def test_warmup_in_epochs_counts_optimizer_steps(tiny_model: Path, tiny_data: Path) -> None:
    """96 rows are 6 batches, and 3 optimizer steps an epoch."""
    model = TextClassifier(str(tiny_model), learning_rate=0.1, warmup="1 epoch")
    seen = _fit(model, tiny_data, accumulate_grad_batches=2)
    assert len(seen) == 6
    # The rate stands before each step; what is noted comes after the scheduler has moved on.
    expected = [2 / 3, 1.0, 1.0, 2 / 3, 1 / 3, 0.0]
    assert [rates[0] for rates in seen] == pytest.approx([0.1 * share for share in expected])


def test_lora_plus_trains_b_at_its_own_rate(tiny_model: Path, tiny_data: Path) -> None:
    model = TextClassifier(
        str(tiny_model), learning_rate=1e-3, lora_plus_ratio=16, schedule="constant", warmup=0
    )
    seen = _fit(model, tiny_data, max_epochs=1)
    assert seen[0] == pytest.approx([1e-3, 1e-3, 16e-3])


def test_another_schedule_takes_the_place_of_warmup_and_decay(
    tiny_model: Path, tiny_data: Path
) -> None:
    model = TextClassifier(
        str(tiny_model),
        learning_rate=0.1,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    seen = _fit(model, tiny_data)
    assert [rates[0] for rates in seen] == pytest.approx([0.1] * 5 + [0.05] * 6 + [0.025])


def test_a_plateau_schedule_watches_the_recipes_metric(tiny_model: Path, tiny_data: Path) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    model = TextClassifier(
        str(tiny_model),
        learning_rate=0.0,
        lr_scheduler=lambda optimizer: plateau(optimizer, mode="max", patience=0),
    )
    _fit(model, tiny_data, max_epochs=3)
    (config,) = model.trainer.lr_scheduler_configs
    assert config.monitor == "val/accuracy"
    assert config.scheduler.last_epoch == 3


def test_callables_stay_out_of_the_checkpoint(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = TextClassifier(
        str(tiny_model),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    _fit(model, tiny_data, max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert not {"optimizer", "lr_scheduler"} & set(saved)
    assert saved["warmup"] == 0.06
    assert saved["label_smoothing"] == 0.0


def test_encoder_decoders_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is an encoder-decoder model \(t5\)"):
        TextClassifier(str(tmp_path), ["a", "b"]).configure_model()


def test_models_without_a_limit_of_positions_leave_the_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, XLNetConfig

    XLNetConfig(d_model=8, n_layer=1, n_head=2, d_inner=8, vocab_size=9).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", model_max_length=77
    )
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).model_max_length == 77
