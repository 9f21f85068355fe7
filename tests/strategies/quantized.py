"""Fits of a 4-bit base, on one process or two: `python -m tests.strategies.quantized JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, unmerge_lora
from lightning_lora.metadata import base_fingerprint
from lightning_lora.quantization import dequantized, quantized_layers
from lightning_lora.sharded import whole
from tests.quantized import quantized
from tests.strategies.scenarios import SAVE_AT, Model, Scenario

RUNS = {
    "one": ("auto", 1, None, "32-true"),
    "two": ("fsdp2", 2, None, "32-true"),
    "two-from-one": ("fsdp2", 2, "one", "32-true"),
    "two-bf16-true": ("fsdp2", 2, None, "bf16-true"),
    "one-from-two": ("auto", 1, "two", "32-true"),
    "one-merged": ("auto", 1, None, "32-true"),
    "two-merged": ("fsdp2", 2, None, "32-true"),
    "dora-one": ("auto", 1, None, "32-true"),
    "dora-two": ("fsdp2", 2, None, "32-true"),
    "dora-two-bf16-true": ("fsdp2", 2, None, "bf16-true"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = quantized(nn.Linear(16, 64), "nf4")
        self.down = quantized(nn.Linear(64, 16), "nf4")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Packed(Model):
    """A residual network of 4-bit layers and a plain head, from the same weights every time."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.ModuleDict(
                {"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(16, 3)}
            )

    def logits(self, x: Tensor) -> Tensor:
        x = x.to(self.net["head"].weight.dtype)
        for block in self.net["blocks"]:  # type: ignore[union-attr]
            x = block(x)
        out: Tensor = self.net["head"](x.mean(1))
        return out


def unpacked(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the 4-bit layers compute with; a collective call."""
    return {
        name: dequantized(layer, torch.float32, whole(layer.weight))
        for name, layer in quantized_layers(model).items()
    }


def fit(root: Path, name: str) -> dict[str, Any]:
    strategy, devices, source, precision = RUNS[name]
    folder = root / name
    seed_everything(5, verbose=False)
    model = Packed(Scenario(name, optimizer="sgd"))
    lora = LoRACallback(
        r=4,
        alpha=12,
        target_modules=["up", "down"],
        verbose=False,
        modules_to_save=None,
        use_dora=name.startswith("dora"),
        merge_on_fit_end=name.endswith("merged"),
        merge_base="requantized",
    )
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVE_AT, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        callbacks=[lora, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    path = None if source is None else str(root / source / f"step={SAVE_AT}.ckpt")
    trainer.fit(model, ckpt_path=path)
    if lora.merge_on_fit_end:
        assert lora.merge_report is not None
        merged, errors = unpacked(model), lora.merge_report.update_errors
        unmerge_lora(model)
        if trainer.is_global_zero:
            torch.save({"merged": merged, "errors": errors}, folder / "merged.pt")
        else:
            assert errors
    return {
        "losses": model.losses,
        "fingerprint": base_fingerprint(model),
        "base": {name: weight.double().sum().item() for name, weight in unpacked(model).items()},
        "sharded": sum(hasattr(p, "device_mesh") for p in model.parameters()),
        "dtypes": sorted({str(p.dtype) for n, p in model.named_parameters() if "weight" in n}),
    }


def main() -> None:
    root, names = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name in names:
        found = fit(Path(root), name)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            (Path(root) / name / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
