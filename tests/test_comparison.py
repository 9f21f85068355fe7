"""Scores of a merged model beside those of the same model unmerged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, validate_merged
from lightning_lora.errors import ConfigError
from lightning_lora.injection import require_injection
from tests.commands import run_command
from tests.quantized import any_bits, quantized_mlp


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = quantized_mlp("nf4")

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.validation_step(batch, 0)

    def validation_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch), batch[:, :3])
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


class Counts(Callback):
    def __init__(self) -> None:
        self.validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations += 1


def loader() -> DataLoader[torch.Tensor]:
    data = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=8)  # type: ignore[arg-type]


def fitted(tmp_path: Path, **settings: Any) -> tuple[Trainer, Regression, LoRACallback, Counts]:
    lora = LoRACallback(r=2, alpha=6, verbose=False, target_modules=["fc1"], **settings)
    counts, module = Counts(), Regression()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[counts, lora],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader())
    return trainer, module, lora, counts


@pytest.mark.parametrize("base", ["dequantized", "requantized"])
def test_the_merged_model_is_scored_and_everything_else_is_left_as_it_was(
    base: str, tmp_path: Path
) -> None:
    trainer, module, _, counts = fitted(tmp_path, merge_base=base)
    logged = [path.read_bytes() for path in sorted(tmp_path.rglob("metrics.csv"))]
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    last, validations = float(trainer.callback_metrics["val/loss"]), counts.validations
    merged = [(p, any_bits(p)) for p in module.parameters()]
    found = validate_merged(trainer, module, loader())
    assert found["unmerged"]["val/loss"] == pytest.approx(last, rel=1e-5)
    rounded = abs(found["merged"]["val/loss"] - last) > 1e-5 * last
    assert rounded == (base == "requantized")
    assert counts.validations == validations
    assert trainer.callbacks == callbacks and trainer.loggers == loggers
    assert float(trainer.callback_metrics["val/loss"]) == last
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("metrics.csv"))] == logged
    assert require_injection(module).merged
    assert all(torch.equal(any_bits(p), bits) for p, bits in merged)
    # Later stages start from the base again.
    trainer.validate(module, loader(), verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(last, rel=1e-5)


def test_a_model_that_was_not_merged_is_left_unmerged(tmp_path: Path) -> None:
    trainer, module, _, _ = fitted(tmp_path, merge_on_fit_end=False)
    found = validate_merged(trainer, module, loader())
    assert found["merged"]["val/loss"] == pytest.approx(found["unmerged"]["val/loss"], rel=1e-5)
    assert not require_injection(module).merged


def test_a_trainer_without_the_callback_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="no LoRACallback"):
        validate_merged(trainer, Regression(), loader())


def test_a_fit_of_a_quantized_base_ends_with_the_scores_of_both(tmp_path: Path) -> None:
    short = ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1"]
    options = ["--model.quantization", "nf4", "--lora.merge_base", "requantized", *short]
    done = run_command(tmp_path, "fit", "--config", "quickstart", *options)
    assert done.returncode == 0, done.stderr
    assert "unmerged" in done.stdout and "(as trained)" in done.stdout
    assert "(requantized)" in done.stdout
    plain = run_command(tmp_path, "fit", "--config", "quickstart", *short)
    assert plain.returncode == 0 and "unmerged" not in plain.stdout
