"""Bytes of a checkpoint, and the time to save and to load it, for a base and one ten times larger.

    python -m benchmarks.checkpoint [--rounds 7]

The adapter has the same number of parameters on both bases: it sits in the last two blocks.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from benchmarks.peers import ALPHA, R, llama, machine
from lightning_lora import LoRACallback, load_adapter

BLOCKS = {"1x": 3, "10x": 30}


class Module(LightningModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = llama(layers)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        ids = torch.zeros(1, 4, dtype=torch.long)
        return self.model(input_ids=ids, labels=ids).loss

    def train_dataloader(self) -> Any:
        return [0]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)


def measure(layers: int, rounds: int, folder: Path) -> dict[str, float]:
    last = "|".join(str(index) for index in range(layers - 2, layers))
    module = Module(layers)
    callback = LoRACallback(
        r=R,
        alpha=ALPHA,
        target_modules=rf"model\.model\.layers\.({last})\..*_proj",
        verbose=False,
        merge_on_fit_end=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    path = folder / f"{layers}.ckpt"
    trained = [p for p in module.parameters() if p.requires_grad]
    saved, loaded = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        trainer.save_checkpoint(path, weights_only=True)
        saved.append(time.perf_counter() - start)
        start = time.perf_counter()
        load_adapter(module, path)
        loaded.append(time.perf_counter() - start)
    return {
        "base MB": sum(p.nbytes for p in module.parameters() if not p.requires_grad) / 1e6,
        "trained bytes": sum(p.nbytes for p in trained),
        "state bytes": sum(
            t.nbytes for t in torch.load(path, weights_only=True)["state_dict"].values()
        ),
        "file bytes": path.stat().st_size,
        "save ms": 1000 * statistics.median(saved[1:]),
        "load ms": 1000 * statistics.median(loaded[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"An adapter on two blocks of a Llama 576 wide; {machine('cpu')}\n")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure(layers, options.rounds, Path(folder)) for name, layers in BLOCKS.items()
        }
    print("| base | " + " | ".join(found["1x"]) + " |")
    print("| --- |" + " --- |" * len(found["1x"]))
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values.values()) + " |")


if __name__ == "__main__":
    main()
