"""Tensors that may be shards of whole ones (`torch.distributed.tensor.DTensor`), read and written
in one way.

Every function takes ordinary tensors as well. `whole`, `all_wholes` and `whole_factors` communicate
when a tensor is sharded, so that every rank has to call them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lives on a device mesh."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that lives in this process; it shares memory with the tensor."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, detached; an ordinary tensor as it is, detached."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    part, mesh = sharded.to_local(), sharded.device_mesh
    if part.device.type != mesh.device_type:
        # Offloaded to the CPU: the collective runs where the mesh lives.
        sharded = shard_from(part.to(mesh.device_type), sharded)
    full: Tensor = sharded.full_tensor()
    return full


def all_wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor; sharded ones on the CPU."""
    return {
        name: whole(tensor).cpu() if is_sharded(tensor) else tensor.detach()
        for name, tensor in tensors.items()
    }


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that ``like`` holds in this process.

    Args:
        value: A whole tensor in the shape of ``like``.
        like: The tensor, sharded or not, whose layout counts.
    """
    if not is_sharded(like):
        return value
    return value[tuple(slice(start, stop) for start, stop in extent(like))]


def shard_from(part: Tensor, like: Tensor) -> Tensor:
    """A sharded tensor in the layout of another, from this process's part."""
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def extent(tensor: Tensor) -> list[tuple[int, int]]:
    """Where the local part lies in the whole: start and stop in each dimension."""
    if not is_sharded(tensor):
        return [(0, size) for size in tensor.shape]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    return [(start, start + size) for start, size in zip(offset, shape, strict=True)]


def _own_part(value: Tensor, like: Tensor) -> Tensor:
    """What this process has of a value that is whole, or sharded like a tensor."""
    return local(value) if is_sharded(value) else part_of(value, like)


def same(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor has the values of another (whole, or sharded alike), each process looking at
    its own part.
    """
    part = _own_part(value, tensor)
    return torch.equal(local(tensor).cpu(), part.cpu())


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value (or a tensor sharded alike) into a tensor, each process its own part."""
    part = _own_part(value, tensor)
    target = local(tensor)
    # A rank whose part is empty has a view that copy_ cannot always match by its shape.
    if target.numel():
        target.copy_(part)


@contextmanager
def whole_factors(lora: nn.Module) -> Iterator[None]:
    """Let a module have its whole parameters in the place of its shards."""
    shards = {name: p for name, p in lora._parameters.items() if p is not None and is_sharded(p)}
    with in_place_of(lora, {name: whole(parameter) for name, parameter in shards.items()}):
        yield


@contextmanager
def in_place_of(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module have other values in the place of its own parameters of these names."""
    kept = dict(module._parameters)
    try:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(kept)


def shard_alike(module: nn.Module, like: Tensor) -> None:
    """Make a module a unit of its own, sharded over the mesh of a tensor.

    Args:
        module: A module whose parameters are used in its own ``forward`` alone.
        like: A shard that `torch.distributed.fsdp.fully_shard` made.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=like.device_mesh)  # type: ignore[attr-defined]


def has_other_layout(tensor: Tensor) -> bool:
    """Whether a sharded tensor is split in another way than `fully_shard` does: by tensor
    parallelism, for instance.
    """
    if not is_sharded(tensor):
        return False
    *copies, split = tensor.placements  # type: ignore[attr-defined]
    return (
        len(copies) > 1 or not split.is_shard(0) or any(not each.is_replicate() for each in copies)
    )


@cache
def _is_unit(kind: type) -> bool:
    return hasattr(kind, "reshard") and hasattr(kind, "unshard")


def reshard(model: nn.Module) -> None:
    """Put the shards back in the place of parameters that a forward pass has gathered."""
    # Wrappers too: what checkpoints activations may be the unit.
    for module in model.modules():
        kind: type = type(module)
        if _is_unit(kind):
            module.reshard()  # type: ignore[operator]


def sum_over_shards(sums: Tensor, tensors: list[Tensor]) -> Tensor:
    """Add what each process has computed from its parts.

    Args:
        sums: int64, one row for each tensor; wraps around modulo 2**64.
        tensors: The tensors; rows of those that are not sharded stay as they are.
    """
    sharded: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            sharded.setdefault(tensor.device_mesh, []).append(index)  # type: ignore[attr-defined]
    for mesh, rows in sharded.items():
        # Shards lie along the last dimension of the mesh; along others there are copies.
        group = mesh.get_group(mesh.ndim - 1)
        part = sums[rows].to(mesh.device_type)
        torch.distributed.all_reduce(part, group=group)
        sums[rows] = part.to(sums.device)
    return sums
