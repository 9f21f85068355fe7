"""The life cycle in processes of their own: a hard kill and a resume, and two ranks under DDP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from lightning_lora import adapter_state_dict
from lightning_lora.sharded import all_wholes
from tests.modules import PlainClassifier, dataset, make_lora, make_trainer

root, steps, ckpt, kill_at, devices, strategy = json.loads(sys.argv[1])
root = Path(root)

class Model(PlainClassifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with open(root / f"losses-{self.global_rank}.txt", "a") as file:
            file.write(f"{self.global_step} {batch_idx} {loss.item()!r}\\n")
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 6))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return DataLoader(dataset(60), batch_size=6 // devices, shuffle=True)

class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Under FSDP one rank alone dies, and the other waits for it in the next gathering.
        if trainer.global_step == kill_at and (strategy != "fsdp2" or trainer.global_rank == 1):
            os.kill(os.getpid(), signal.SIGKILL)

seed_everything(5)
torch.set_num_threads(1)
model = Model("mlp", dropout=0.2)
saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
lora = make_lora(dropout=0.1, export_dir=str(root / "out"))
trainer = make_trainer(
    root, lora, callbacks=[saver, Kill()],
    max_steps=steps, max_epochs=-1, accumulate_grad_batches=2,
    devices=devices, strategy=strategy,
)
trainer.fit(model, ckpt_path=ckpt)
torch.save(all_wholes(adapter_state_dict(model)), root / f"adapter-{trainer.global_rank}.pt")
trainer.test(model, ckpt_path="best", verbose=False)
torch.save(all_wholes(model.state_dict()), root / f"merged-{trainer.global_rank}.pt")
"""


def run(
    root: Path,
    steps: int = 12,
    ckpt: Path | None = None,
    kill_at: int = -1,
    devices: int = 1,
    strategy: str = "auto",
) -> subprocess.CompletedProcess[str]:
    root.mkdir(parents=True, exist_ok=True)
    script = root / "script.py"
    script.write_text(SCRIPT)
    values = [str(root), steps, str(ckpt) if ckpt else None, kill_at, devices, strategy]
    settings = json.dumps(values)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), settings]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def losses(root: Path, rank: int = 0) -> list[str]:
    return (root / f"losses-{rank}.txt").read_text().splitlines()


def adapter(root: Path, rank: int = 0, kind: str = "adapter") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(root / f"{kind}-{rank}.pt", weights_only=True)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp2")])
def test_killed_and_resumed_is_bitwise_the_straight_run(
    tmp_path: Path, devices: int, strategy: str
) -> None:
    """Dropout, accumulation, warm-up, a shuffled loader, and a checkpoint in the middle of an
    epoch.
    """
    straight = run(tmp_path / "straight", devices=devices, strategy=strategy)
    assert straight.returncode == 0, straight.stderr
    killed = run(tmp_path / "killed", kill_at=8, devices=devices, strategy=strategy)
    assert killed.returncode != 0
    if devices == 1:
        assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/adapter-0.pt").exists()
    ckpt = tmp_path / "killed/step=6.ckpt"
    resumed = run(tmp_path / "resumed", ckpt=ckpt, devices=devices, strategy=strategy)
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(devices):
        # Ten batches an epoch, two a step: step 6 is in the middle of the second epoch.
        expected = losses(tmp_path / "straight", rank)
        assert len(expected) == 24
        assert losses(tmp_path / "resumed", rank) == expected[12:]
        before, after = adapter(tmp_path / "straight", rank), adapter(tmp_path / "resumed", rank)
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_ranks_agree_under_ddp(tmp_path: Path) -> None:
    result = run(tmp_path, devices=2, strategy="ddp")
    assert result.returncode == 0, result.stderr
    first, second = adapter(tmp_path, 0), adapter(tmp_path, 1)
    assert len(first) == 6 and all(torch.equal(first[key], second[key]) for key in first)
    assert losses(tmp_path, 0) != losses(tmp_path, 1), "each rank sees data of its own"
    merged = adapter(tmp_path, 0, "merged")
    assert not any("lora" in key for key in merged)
    assert all(
        torch.equal(merged[key], value) for key, value in adapter(tmp_path, 1, "merged").items()
    )
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert set(checkpoint["state_dict"]) == set(first), path
        assert checkpoint["lightning_lora"]["base"]["fingerprint"]
    assert (tmp_path / "out/merged/model.safetensors").exists()
