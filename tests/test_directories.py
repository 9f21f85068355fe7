"""Sharded checkpoints that lack something; the scenarios show that whole ones are read well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_lora.directories import is_directory, read_directory
from lightning_lora.errors import CheckpointError


def write(folder: Path, parts: int = 2) -> Path:
    """A matrix of four rows by hand, two in each part."""
    folder.mkdir()
    whole = torch.arange(12.0).reshape(4, 3)
    frame = {"state_dict": {"a": {"\0tensor": "state_dict/a"}}, "epoch": 3}
    torch.save({"frame": frame, "parts": parts}, folder / "meta.pt")
    for rank, rows in enumerate(whole.chunk(2)):
        places = {"state_dict/a": [[4, 3], [2 * rank, 0]]}
        save_file(
            {"state_dict/a": rows.clone()},
            folder / f"part-{rank:05d}.safetensors",
            metadata={"places": json.dumps(places)},
        )
    return folder


def test_parts_are_joined(tmp_path: Path) -> None:
    folder = write(tmp_path / "a.ckpt")
    assert is_directory(folder) and not is_directory(tmp_path)
    checkpoint = read_directory(folder)
    assert checkpoint["epoch"] == 3
    assert torch.equal(checkpoint["state_dict"]["a"], torch.arange(12.0).reshape(4, 3))


def lose(folder: Path) -> None:
    (folder / "part-00001.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "part-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def count_one(folder: Path) -> None:
    meta = torch.load(folder / "meta.pt", weights_only=True)
    torch.save({**meta, "parts": 1}, folder / "meta.pt")


def foreign(folder: Path) -> None:
    torch.save({"epoch": 1}, folder / "meta.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, "part-00001.safetensors is missing"),
        (cut, "part-00001.safetensors could not be read"),
        (count_one, "parts of state_dict/a are missing"),
        (foreign, "of another kind"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write(tmp_path / "a.ckpt")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_directory(folder)
