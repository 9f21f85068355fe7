"""LightningModules that the tests of the Trainer's life cycle share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback


class Attention(nn.Module):
    """Embeds, mixes by `nn.TransformerEncoder`, pools and classifies: nothing from transformers."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.query = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head((x * self.query(x).softmax(1)).sum(1))


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.Linear(32, 3)
    )


def base_network(name: str, dropout: float) -> nn.Module:
    """The same "pretrained" weights at every call, without touching the global random state."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        return Attention(dropout) if name == "attention" else mlp(dropout)


def dataset(n: int = 64, name: str = "mlp") -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 5, 16, generator=generator)
    x = x if name == "attention" else x[:, 0]
    return TensorDataset(x, x[..., :3].reshape(n, -1, 3).sum(1).argmax(1))


class Classifier(LightningModule):
    """An ordinary LightningModule; ``where`` says in which hook the network is built."""

    def __init__(
        self, network: str = "mlp", where: str = "init", dropout: float = 0.0, lr: float = 0.01
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.losses: list[float] = []
        if where == "init":
            self.net = base_network(network, dropout)

    def setup(self, stage: str) -> None:
        if self.hparams["where"] == "setup" and not hasattr(self, "net"):
            self.net = base_network(self.hparams["network"], self.hparams["dropout"])

    def configure_model(self) -> None:
        if self.hparams["where"] == "configure_model" and not hasattr(self, "net"):
            self.net = base_network(self.hparams["network"], self.hparams["dropout"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"]
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(name=self.hparams["network"]), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(32, name=self.hparams["network"]), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


class PlainClassifier(Classifier):
    """Overrides no hook in which a model could be built, so that LoRA is injected in the callback's
    setup.
    """

    setup = LightningModule.setup
    configure_model = LightningModule.configure_model


def make_trainer(root: Path, lora: LoRACallback | None = None, **options: Any) -> Trainer:
    checkpoint = ModelCheckpoint(root, monitor="val_loss", save_last=True, filename="{epoch}")
    callbacks = [*([lora] if lora else []), checkpoint, *options.pop("callbacks", [])]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **options})


def make_lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 4, "alpha": 12, "verbose": False, **options})
