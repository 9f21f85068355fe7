"""A fingerprint of the frozen base: cheap, exact, and independent of precision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.sharded import extent, is_sharded, local, sum_over_shards, whole

_ROW = 1024
_CHUNK_ROWS = 2048
_MODULUS = 2**64
_SIGN = 2**63


@dataclass(frozen=True)
class Packed:
    """A tensor of which the bytes count, and neither the dtype nor the shape they are stored in."""

    tensor: Tensor


def fingerprint(tensors: Iterable[Tensor | Packed]) -> str:
    """A hash of values, shapes and order of tensors.

    Every element counts, with a weight that depends on its position; values are first rounded to
    bfloat16, so that a float32 base and its bfloat16 copy have the same fingerprint. Sums are
    exact, hence the same on every device and in any order of summation.

    A sharded base has the fingerprint of the whole; each process reads its shards alone.

    Args:
        tensors: Parameters of the base, in the order of the model; packed weights as `Packed`.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> W = torch.arange(6.0).reshape(2, 3)
        >>> fingerprint([W]) == fingerprint([W.bfloat16()])
        True
        >>> fingerprint([W]) == fingerprint([W + 1])
        False
    """
    kept, sums, shapes = [], [], []
    for each in tensors:
        tensor, offset = _flat_part(each.tensor if isinstance(each, Packed) else each)
        part, shape = local(tensor).detach(), tuple(tensor.shape)
        if isinstance(each, Packed):
            size = tensor.dtype.itemsize
            part, offset = part.reshape(-1).view(torch.uint8), offset * size
            shape = (tensor.numel() * size,)
        sums.append(position_sums(part, offset))
        # Only shards are summed up; the others may be read from files one after the other.
        kept.append(tensor if is_sharded(tensor) else torch.empty(0))
        shapes.append(shape)
    signed = [[(value + _SIGN) % _MODULUS - _SIGN for value in pair] for pair in sums]
    totals = sum_over_shards(torch.tensor(signed, dtype=torch.int64).reshape(-1, 2), kept).tolist()
    digest = hashlib.blake2b(digest_size=16)
    for shape, (plain, weighted) in zip(shapes, totals, strict=True):
        digest.update(f"{shape}:{plain % _MODULUS}:{weighted % _MODULUS};".encode())
    return digest.hexdigest()


@torch.no_grad()
def position_sums(tensor: Tensor, offset: int = 0) -> tuple[int, int]:
    """The sum of a tensor's bfloat16 bit patterns, and the same weighted by position, modulo 2**64.

    Both are additive over consecutive parts of a flattened tensor when each part is given its
    ``offset``.

    Args:
        tensor: Any tensor; integers count by their own values modulo 2**16.
        offset: Position of its first element in the whole.
    """
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "mps":
        flat = flat.cpu()  # no float64 there
    plain = weighted = 0
    ramp = torch.arange(_ROW, dtype=torch.float64, device=flat.device)
    for start in range(0, flat.numel(), _ROW * _CHUNK_ROWS):
        bits = _bits(flat[start : start + _ROW * _CHUNK_ROWS])
        if padding := -bits.numel() % _ROW:
            bits = torch.nn.functional.pad(bits, (0, padding))
        rows = bits.view(-1, _ROW)
        # Sums over a row stay far below 2**53, so float64 holds them exactly.
        row_sums = rows.sum(1).to(torch.int64)
        in_rows = torch.mv(rows, ramp).to(torch.int64)
        row_starts = torch.arange(rows.shape[0], device=flat.device) * _ROW
        total = int(row_sums.sum())
        plain += total
        weighted += (
            int((row_sums * row_starts).sum() + in_rows.sum()) + (offset + start + 1) * total
        )
    return plain % _MODULUS, weighted % _MODULUS


def _flat_part(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor and where its local part starts in the flattened whole."""
    if not is_sharded(tensor):
        return tensor, 0
    rows, *others = extent(tensor)
    if any(
        stop - start != size for (start, stop), size in zip(others, tensor.shape[1:], strict=True)
    ):
        return whole(tensor), 0  # its part is not one piece of the flattened whole
    return tensor, rows[0] * tensor.shape[1:].numel()


def _bits(values: Tensor) -> Tensor:
    if values.is_floating_point():
        return values.to(torch.bfloat16).view(torch.uint16).to(torch.float64)
    return (values.to(torch.int32) & 0xFFFF).to(torch.float64)
