"""What a strategy writes: whole checkpoints or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.errors import CheckpointError
from tests.modules import PlainClassifier, make_lora, make_trainer


def filling_up(monkeypatch: pytest.MonkeyPatch, after: int) -> list[Path]:
    """Let the disk be full after some checkpoints; returns what is written to."""
    save = TorchCheckpointIO.save_checkpoint
    written: list[Path] = []

    def saving(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        written.append(Path(path))
        if len(written) <= after:
            return save(self, checkpoint, path, storage_options)
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", saving)
    return written


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="newest", enable_version_counter=False)
    trainer = make_trainer(tmp_path, make_lora(), max_epochs=3, callbacks=[keep])
    written = filling_up(monkeypatch, after=2)
    with pytest.raises(CheckpointError, match=r"\.ckpt was not written: there is no room left"):
        trainer.fit(PlainClassifier())
    assert len(written) == 3 and all(path.name.startswith(".") for path in written)
    files = sorted(tmp_path.rglob("*"))
    assert not any(path.name.startswith(".") for path in files)
    checkpoints = [path for path in files if path.suffix == ".ckpt"]
    assert checkpoints
    for path in checkpoints:
        assert torch.load(path, weights_only=True)["global_step"] > 0


def test_a_checkpoint_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_lora(), max_epochs=1)
    trainer.fit(PlainClassifier())
    target = tmp_path / "mine" / "x.ckpt"
    for _ in range(2):
        trainer.save_checkpoint(target)
        assert torch.load(target, weights_only=True)["lightning_lora"]
    assert [path.name for path in target.parent.iterdir()] == ["x.ckpt"]


def test_a_checkpoint_io_of_ones_own_gets_the_path_itself(tmp_path: Path) -> None:
    paths: list[str] = []

    class Noting(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            paths.append(str(path))
            super().save_checkpoint(checkpoint, path, None)

    trainer = make_trainer(tmp_path, make_lora(), max_epochs=1, plugins=[Noting()])
    trainer.fit(PlainClassifier())
    trainer.save_checkpoint(tmp_path / "x.ckpt", storage_options={"a": 1})
    assert paths[-1] == str(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["lightning_lora"]
