"""Lightning's `BitsandbytesPrecision` on any LightningModule.

The Trainer accepts the plugin on CUDA devices alone, so the tests hand it to the strategy
themselves; everything else is Lightning's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn

from lightning_lora import LoRACallback
from lightning_lora.errors import ConfigError
from lightning_lora.layers.quantized import LoRALinear4bit, LoRALinear8bitLt
from lightning_lora.quantization import quantized_layers
from tests.modules import Classifier, PlainClassifier, make_lora, make_trainer
from tests.quantized import any_bits

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]


def trainer_with(plugin: BitsandbytesPrecision, *args: Any, **options: Any) -> Trainer:
    trainer = make_trainer(*args, **options)
    trainer.strategy._precision_plugin = plugin
    return trainer


def plugin_of(mode: str) -> BitsandbytesPrecision:
    return BitsandbytesPrecision(mode, dtype=None if mode == "int8" else torch.bfloat16)  # type: ignore[arg-type]


def model_of(where: str) -> LightningModule:
    return PlainClassifier() if where == "plain" else Classifier(where=where)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["plain", "setup", "configure_model"])
def test_converted_first_adapted_after_and_frozen(mode: str, where: str, tmp_path: Path) -> None:
    lora: LoRACallback = make_lora(target_modules=["net.0", "net.3"], merge_on_fit_end=False)
    model = model_of(where)
    trainer = trainer_with(plugin_of(mode), tmp_path, lora, max_epochs=1)
    trainer.fit(model)
    kind = LoRALinear8bitLt if mode == "int8" else LoRALinear4bit
    assert isinstance(model.net[0], kind) and isinstance(model.net[3], kind)
    assert list(quantized_layers(model)) == ["net.0", "net.3", "net.4"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"net.{n}.lora.{f}" for n in (0, 3) for f in "AB"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.net[0].lora.B.abs().sum() > 0
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == trained
    assert checkpoint["lightning_lora"]["base"]["quantization"]["kind"].startswith(mode[:3])


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_merging_testing_and_fitting_again(mode: str, tmp_path: Path) -> None:
    lora = make_lora(target_modules=["net.0", "net.3"])
    model = PlainClassifier()
    trainer = trainer_with(plugin_of(mode), tmp_path, lora)
    trainer.fit(model)
    assert type(model.net[0]) is nn.Linear and not quantized_layers(model)
    assert lora.merge_report is not None and len(lora.merge_report.errors) == 3
    merged = trainer.test(model, verbose=False, ckpt_path=None)[0]["test_loss"]
    assert merged == merged and model.losses[-1] < model.losses[0] * 1.2
    again = trainer.test(model, ckpt_path="best", verbose=False)[0]["test_loss"]
    assert again == pytest.approx(merged, abs=0.5)
    more = PlainClassifier()
    trainer_with(
        plugin_of(mode), tmp_path / "b", make_lora(target_modules=["net.0", "net.3"]), max_epochs=3
    ).fit(more, ckpt_path=tmp_path / "last.ckpt")
    assert type(more.net[0]) is nn.Linear


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    models = []
    for epochs, path in ((3, None), (1, None), (3, tmp_path / "1" / "last.ckpt")):
        torch.manual_seed(0)
        model = PlainClassifier(dropout=0.1)
        lora = make_lora(target_modules=["net.0", "net.3"], merge_on_fit_end=False)
        folder = tmp_path / str(epochs)
        trainer_with(plugin_of("nf4"), folder, lora, max_epochs=epochs).fit(model, ckpt_path=path)
        models.append(model)
    for name in ("net.0.weight", "net.0.lora.A", "net.0.lora.B", "net.3.lora.B"):
        whole, resumed = (any_bits(model.get_parameter(name)) for model in (models[0], models[2]))
        assert torch.equal(whole, resumed), name


def test_what_trains_whole_is_not_quantized(tmp_path: Path) -> None:
    lora = make_lora(target_modules=["net.0"], modules_to_save=["net.4"], merge_on_fit_end=False)
    model = PlainClassifier()
    plugin = BitsandbytesPrecision("nf4", dtype=torch.float32)
    trainer_with(plugin, tmp_path, lora, max_epochs=1).fit(model)
    assert list(quantized_layers(model)) == ["net.0", "net.3"]
    assert type(model.net[4]) is nn.Linear and model.net[4].weight.requires_grad


def test_a_mode_that_trains_the_weights(tmp_path: Path) -> None:
    plugin = BitsandbytesPrecision("int8-training")
    with pytest.raises(ConfigError, match="mode='int8'"):
        trainer_with(plugin, tmp_path, make_lora()).fit(PlainClassifier())
