"""Bytes of a checkpoint, and the time to save and to load it, for a base and one ten times larger.

    python -m benchmarks.checkpoint [--rounds 7]

The adapter has the same number of parameters on both bases: it sits in the last two blocks. PEFT
saves and loads the same adapter in the same rounds, through its own functions.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
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


def peft_like(layers: int, targets: str) -> Any:
    """A PEFT model with the adapter of the same layers."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    return peft.get_peft_model(llama(layers), config)


def measure(layers: int, rounds: int, folder: Path) -> dict[str, float]:
    last = "|".join(str(index) for index in range(layers - 2, layers))
    layer_names = rf"model\.layers\.({last})\..*_proj"
    module = Module(layers)
    callback = LoRACallback(
        r=R,
        alpha=ALPHA,
        target_modules=rf"model\.{layer_names}",
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
    peer = peft_like(layers, layer_names)
    actions: dict[str, Callable[[], object]] = {
        "save": lambda: trainer.save_checkpoint(path, weights_only=True),
        "load": lambda: load_adapter(module, path),
        "PEFT save": lambda: peer.save_pretrained(folder / "peft"),
        "PEFT load": lambda: peer.load_adapter(folder / "peft", adapter_name="default"),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {
        "base MB": sum(p.nbytes for p in module.parameters() if not p.requires_grad) / 1e6,
        "trained bytes": sum(p.nbytes for p in trained),
        "state bytes": sum(
            t.nbytes for t in torch.load(path, weights_only=True)["state_dict"].values()
        ),
        "file bytes": path.stat().st_size,
        **{f"{name} ms": 1000 * statistics.median(own[1:]) for name, own in times.items()},
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
