"""Recipes on two ranks, and resumed in the middle of an epoch of grouped batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, signal, sys
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_lora import LoRACallback
from lightning_lora.recipes import ClassificationDataModule, TextClassifier

root, model_dir, data_dir, devices, workers, kill_at, ckpt = json.loads(sys.argv[1])
torch.set_num_threads(1)
seed_everything(3, verbose=False)

class Losses(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        row = [trainer.global_step, sorted(batch["row"].tolist()), float(outputs["loss"]).hex()]
        with open(f"{root}/losses-{trainer.global_rank}.jsonl", "a") as stream:
            stream.write(json.dumps(row) + "\\n")
        if trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
    logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    callbacks=[
        LoRACallback(dropout=0.1, verbose=False, merge_on_fit_end=False), Losses(),
        ModelCheckpoint(root, "{step}", every_n_train_steps=3, save_top_k=-1),
    ],
)
data = ClassificationDataModule(
    train_file=f"{data_dir}/train.csv", validation_file=f"{data_dir}/validation.csv",
    batch_size=8 // devices, num_workers=workers,
)
model = TextClassifier(model_dir, learning_rate=1e-2)
trainer.fit(model, data, ckpt_path=ckpt)
if trainer.is_global_zero:
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    with open(f"{root}/scores.json", "w") as stream:
        json.dump(scores, stream)
"""


def _run(root: Path, *arguments: Any, check: bool = True) -> None:
    root.mkdir(exist_ok=True)
    (root / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(root / "script.py"), json.dumps([str(root), *arguments])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == check, done.stderr


def _losses(root: Path, rank: int = 0) -> list[Any]:
    return [json.loads(line) for line in (root / f"losses-{rank}.jsonl").open()]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_grouped_batches_resume_bitwise_in_the_middle_of_an_epoch(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, workers: int
) -> None:
    common = (str(tiny_model), str(tiny_data), 1, workers)
    _run(tmp_path / "straight", *common, -1, None)
    _run(tmp_path / "killed", *common, 8, None, check=False)
    _run(tmp_path / "resumed", *common, -1, str(tmp_path / "killed" / "step=6.ckpt"))
    straight = _losses(tmp_path / "straight")
    assert len(straight) == 24
    assert _losses(tmp_path / "resumed") == straight[6:]


@pytest.mark.slow
def test_two_ranks_share_each_batch_of_one_process(
    tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    for name, devices in (("one", 1), ("two", 2)):
        _run(tmp_path / name, str(tiny_model), str(tiny_data), devices, 0, -1, None)
    one, two = _losses(tmp_path / "one"), [_losses(tmp_path / "two", rank) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 24
    for whole, *parts in zip(one, *two, strict=True):
        assert sorted(parts[0][1] + parts[1][1]) == whole[1], "the same rows at the same step"
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two")]
    assert set(scores[0]) == set(scores[1])
    assert "val/accuracy" in scores[1]
