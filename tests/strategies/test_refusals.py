"""What cannot be done under a strategy is said before the fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lightning_lora import FSDP2Strategy
from lightning_lora.checks import check_strategy
from lightning_lora.errors import ConfigError
from tests.models import TiedHead
from tests.modules import PlainClassifier, make_lora, make_trainer


class Tied(PlainClassifier):
    """Adapts the head, whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TiedHead()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x.abs() * 3).long().clamp(max=10)).mean(1)[:, :3]
        return out


def test_deepspeed_is_pointed_to_fsdp2() -> None:
    strategy = object.__new__(DeepSpeedStrategy)
    with pytest.raises(ConfigError, match=r"DeepSpeedStrategy is not supported .* 'fsdp2' shards"):
        check_strategy(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]


def test_another_number_of_processes_than_the_launcher_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(tmp_path, make_lora(), strategy="fsdp2", devices=1)
    with pytest.raises(ConfigError, match=r"2 processes were started, and .* which makes 1"):
        trainer.fit(PlainClassifier())


def test_replicas_must_be_a_number_of_copies() -> None:
    with pytest.raises(ConfigError, match="replicas must be at least 1"):
        FSDP2Strategy(replicas=0)


def test_a_gradient_scaler_cannot_be_had() -> None:
    strategy = FSDP2Strategy()
    strategy.precision_plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="needs a gradient scaler"):
        strategy._convert(TiedHead())


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"replicas": 3}, PlainClassifier, "replicas=3 does not divide the 1 processes"),
        ({}, Tied, "'net.head' shares its weight"),
    ],
)
def test_refused_before_the_fit(tmp_path: Path, options: Any, model: Any, message: str) -> None:
    lora = make_lora(target_modules=["head"] if model is Tied else "all-linear")
    strategy = FSDP2Strategy(**options) if options else "fsdp2"
    trainer = make_trainer(tmp_path, lora, strategy=strategy)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(model())
    assert not list(tmp_path.glob("*.ckpt"))
