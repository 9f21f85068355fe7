"""Fits from a base that LoftQ quantizes anew: `python -m tests.strategies.rounds JSON`.

The JSON holds a folder and runs, each a name, a strategy, a number of processes and perhaps the run
to resume.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback
from tests.quantized import quantized_hugging_face
from tests.strategies.scenarios import SAVE_AT, Model, Scenario


class Quantized(Model):
    """A tiny BERT in 4 bits, loaded from the folder that holds its original weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Scenario("rounds", optimizer="sgd", network="quantized"))
        self.net = quantized_hugging_face("bert", "nf4", folder)
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def logits(self, x: Tensor) -> Tensor:
        return F.pad(super().logits(x)[:, :2], (0, 1))


def fit(root: Path, name: str, strategy: str, devices: int, source: str | None) -> list[float]:
    seed_everything(5, verbose=False)
    model = Quantized(root / "base")
    settings = {"init": "loftq", "loftq_iter": 3, "merge_on_fit_end": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[
            LoRACallback(r=4, alpha=12, verbose=False, **settings),  # type: ignore[arg-type]
            ModelCheckpoint(
                root / name, filename="{step}", every_n_train_steps=SAVE_AT, save_top_k=-1
            ),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=root / name,
    )
    path = None if source is None else str(root / source / f"step={SAVE_AT}.ckpt")
    trainer.fit(model, ckpt_path=path)
    return model.losses


def main() -> None:
    root, runs = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name, strategy, devices, source in runs:
        losses = fit(Path(root), name, strategy, devices, source)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            (Path(root) / name / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
