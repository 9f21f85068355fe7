"""Fits under many strategies in one set of processes: `python -m tests.strategies.scenarios JSON`.

The JSON lists scenarios; each writes ``result.json``, ``merged.pt`` and its checkpoints into a
folder of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import FSDP2Strategy, LoRACallback
from lightning_lora.pretrained import pretrained_on_meta
from tests.models import hugging_face
from tests.modules import Attention, dataset
from tests.strategies.flat import CPUFSDPStrategy

STEPS, SAVE_AT, BATCH = 6, 3, 8


@dataclass
class Scenario:
    """One fit."""

    name: str
    strategy: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    network: str = "attention"
    optimizer: str = "adamw"
    resume: str | None = None
    seed: int | None = 5


class Model(LightningModule):
    """Trains on the same global batches whatever the number of processes."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.scenario = scenario
        self.losses: list[float] = []
        if scenario.network == "attention":
            self.net: nn.Module = Attention(dropout=0.0)
        elif scenario.network == "bert":
            self.net = hugging_face("bert")
            for module in self.net.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    def logits(self, x: Tensor) -> Tensor:
        if self.scenario.network in ("attention", "user"):
            out: Tensor = self.net(x)
            return out
        ids = (x.abs().sum(-1) * 7).long() % 40
        logits: Tensor = self.net(input_ids=ids).logits
        return logits[:, -1, :3] if logits.ndim == 3 else F.pad(logits, (0, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]).float(), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        mean = outputs["loss"].detach().clone().float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
        self.losses.append(mean.item() / self.trainer.world_size)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self.logits(batch[0]).float(), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log(
            "test_loss", F.cross_entropy(self.logits(batch[0]).float(), batch[1]), sync_dist=True
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.scenario.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.3, momentum=0.9)
        return torch.optim.AdamW(trained, lr=0.01)

    def loader(self, size: int) -> DataLoader[Any]:
        world = self.trainer.world_size
        data = dataset(size, "attention")
        sampler = DistributedSampler(data, world, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(STEPS * BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(4 * BATCH)

    test_dataloader = val_dataloader


class Pretrained(Model):
    """Loads a saved model, under FSDP2 without reading it whole."""

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if hasattr(self, "net"):
            return
        if self.scenario.strategy == "fsdp2":
            self.net = pretrained_on_meta(AutoModelForCausalLM, self.scenario.network)
        else:
            self.net = AutoModelForCausalLM.from_pretrained(self.scenario.network).train()


class ShardedByTheUser(Model):
    """Builds and shards its network by itself."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "net"):
            return
        self.net = Attention(dropout=0.0)
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def strategy_of(scenario: Scenario) -> Any:
    if scenario.strategy == "fsdp2" and scenario.options:
        return FSDP2Strategy(**scenario.options)
    if scenario.strategy == "fsdp":
        return CPUFSDPStrategy(**scenario.options)
    return scenario.strategy


def fit(scenario: Scenario, root: Path, devices: int) -> dict[str, Any]:
    folder = root / scenario.name
    if scenario.seed is not None:
        seed_everything(scenario.seed, verbose=False)
    kinds = {"attention": Model, "bert": Model, "user": ShardedByTheUser}
    model = kinds.get(scenario.network, Pretrained)(scenario)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVE_AT, save_top_k=-1)
    lora = LoRACallback(**{"r": 4, "alpha": 12, "verbose": False, **scenario.lora})
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(scenario),
        callbacks=[lora, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{"max_epochs": 1, **scenario.trainer},
    )
    trainer.fit(model, ckpt_path=None if scenario.resume is None else str(root / scenario.resume))
    classes = sorted({type(m).__name__ for m in model.modules()})
    assert lora._sharding is not None
    merged = {name: tensor.clone() for name, tensor in lora._sharding.tensors(model)}
    last = trainer.test(model, verbose=False)[0]["test_loss"]
    saved = min(folder.glob("step=*.ckpt"))
    best = trainer.test(model, ckpt_path=str(saved), verbose=False)
    result = {
        "losses": model.losses,
        "classes": classes,
        "test": last,
        "test_of_checkpoint": best[0]["test_loss"],
    }
    if trainer.is_global_zero:
        torch.save(merged, folder / "merged.pt")
    return result


def main() -> None:
    root, devices, listed = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for values in listed:
        scenario = Scenario(**values)
        folder = Path(root) / scenario.name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = fit(scenario, Path(root), devices)
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
            raise
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))


def asked(scenarios: list[Scenario]) -> list[dict[str, Any]]:
    return [asdict(scenario) for scenario in scenarios]


if __name__ == "__main__":
    main()
