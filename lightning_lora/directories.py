"""Sharded checkpoints: a folder in which each rank has written its own parts.

``meta.pt`` holds everything that is no tensor of the model or of an optimizer, and
``part-R.safetensors`` the parts of rank R, each with its place in the whole. Nothing in them is
executed on loading, and any number of processes can read them, sharded or not.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_lora.errors import CheckpointError
from lightning_lora.files import adopt
from lightning_lora.sharded import extent, is_sharded, local

# Lightning tells a sharded checkpoint by this file.
META_FILE = "meta.pt"
_PLACES = "places"


def is_directory(path: str | Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (Path(path) / META_FILE).is_file()


def save_directory(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder; a collective call.

    The folder takes the place of what is at ``path`` once every rank has written its part.

    Args:
        checkpoint: With tensors, sharded or not, in ``state_dict`` and ``optimizer_states``; the
            same on every rank but for them.
        path: The same on every rank, on storage that all of them share.

    Raises:
        CheckpointError: A rank could not write. What was at ``path`` before is still there.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tensors: dict[str, Tensor] = {}
    frame = _split(dict(checkpoint), tensors)
    fresh: list[Any] = [None]
    error: Exception | None = None
    if rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = [tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)]
        except OSError as problem:
            error = problem
    torch.distributed.broadcast_object_list(fresh)
    try:
        if fresh[0] is not None:
            _write_part(Path(fresh[0]), rank, tensors)
            if rank == 0:
                torch.save({"frame": frame, "parts": world}, Path(fresh[0]) / META_FILE)
    except Exception as problem:  # whatever it is, the other ranks have to learn of it
        error = problem
    errors: list[Any] = [None] * world
    torch.distributed.all_gather_object(errors, error and f"{type(error).__name__}: {error}")
    if any(errors):
        if rank == 0 and fresh[0] is not None:
            shutil.rmtree(fresh[0], ignore_errors=True)
        listed = "; ".join(f"rank {r}: {what}" for r, what in enumerate(errors) if what)
        raise CheckpointError(
            f"The checkpoint {path} was not written ({listed}). What was there before is "
            "untouched. Sharded checkpoints need storage that all ranks share."
        ) from error
    if rank == 0:
        adopt(Path(fresh[0]), path)
    torch.distributed.barrier()


def read_directory(path: str | Path) -> dict[str, Any]:
    """Read a sharded checkpoint into whole tensors on the CPU; every process on its own.

    Raises:
        CheckpointError: A part is missing or damaged.
    """
    path = Path(path)
    meta = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    if not isinstance(meta, dict) or "frame" not in meta:
        raise CheckpointError(
            f"{path} is a sharded checkpoint of another kind (its {META_FILE} was not written by "
            "LoRACallback). Load it with the tool that wrote it."
        )
    tensors: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for rank in range(meta["parts"]):
        file = path / _part_name(rank)
        if not file.is_file():
            raise CheckpointError(
                f"{path} is incomplete: {file.name} is missing (it was written by {meta['parts']} "
                "ranks). Copy the whole folder, or use an earlier checkpoint."
            )
        try:
            _read_part(file, tensors, missing)
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{file} could not be read: it is truncated or damaged ({error}). Use an earlier "
                "checkpoint."
            ) from error
    if gaps := [key for key, count in missing.items() if count]:
        raise CheckpointError(f"{path} is incomplete: parts of {gaps[0]} are missing.")
    joined: dict[str, Any] = _join(meta["frame"], tensors)
    return joined


def _write_part(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    parts, places = {}, {}
    for key, tensor in tensors.items():
        if not _is_mine(tensor, rank):
            continue
        starts = [start for start, _ in extent(tensor)]
        part = local(tensor).detach().cpu().contiguous()
        if part.numel() or rank == 0:
            parts[key], places[key] = part, [list(tensor.shape), starts]
    save_file(parts, folder / _part_name(rank), metadata={_PLACES: json.dumps(places)})


def _is_mine(tensor: Tensor, rank: int) -> bool:
    """Whether this rank is the one that writes its part of a tensor."""
    if not is_sharded(tensor):
        return rank == 0
    sharded: Any = tensor
    coordinates = sharded.device_mesh.get_coordinate()
    copies = [
        coordinate
        for coordinate, placement in zip(coordinates, sharded.placements, strict=True)
        if placement.is_replicate()
    ]
    return not any(copies)


def _read_part(file: Path, tensors: dict[str, Tensor], missing: dict[str, int]) -> None:
    with safe_open(file, framework="pt") as part:
        places = json.loads((part.metadata() or {}).get(_PLACES, "{}"))
        for key, (shape, starts) in places.items():
            value = part.get_tensor(key)
            if key not in tensors:
                tensors[key] = torch.empty(shape, dtype=value.dtype)
                missing[key] = tensors[key].numel()
            window = tuple(
                slice(start, start + size) for start, size in zip(starts, value.shape, strict=True)
            )
            tensors[key][window] = value
            missing[key] -= value.numel()


def _split(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Move the tensors of the model's and the optimizers' states out of a checkpoint.

    Args:
        value: The checkpoint or a part of it.
        tensors: Receives them by their path.
        path: Where the value stands.

    Returns:
        The checkpoint with paths in their places.
    """
    if not path:
        moved = ("state_dict", "optimizer_states")
        return {
            key: _split(part, tensors, f"{key}") if key in moved else part
            for key, part in value.items()
        }
    if isinstance(value, Mapping):
        return {key: _split(part, tensors, f"{path}/{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [_split(part, tensors, f"{path}/{index}") for index, part in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_MOVED: path}
    return value


_MOVED = "\0tensor"


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _MOVED in value:
            return tensors[value[_MOVED]]
        return {key: _join(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_join(part, tensors) for part in value]
    return value


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"
