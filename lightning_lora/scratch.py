"""Memory that is used again for tensors that are read once: on a CPU, fresh memory costs a page
fault every 4 KiB.

A tensor from here is valid until the next call in the same thread with the same dtype.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import Parameter

# Larger tensors than this are not worth keeping memory for.
LARGEST = 2**26


def cast_for_now(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; itself if it has it."""
    if tensor.dtype == dtype:
        return tensor
    scratch = _scratch(tensor, dtype)
    return tensor.to(dtype) if scratch is None else scratch.copy_(tensor)


def copy_for_now(tensor: Tensor) -> Tensor | None:
    """A contiguous copy, or ``None`` where fresh memory serves better."""
    scratch = _scratch(tensor, tensor.dtype)
    return None if scratch is None else scratch.copy_(tensor)


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_BUFFERS = _Buffers()


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if (
        torch.compiler.is_compiling()
        or like.device.type != "cpu"
        or type(like) not in (Tensor, Parameter)
        or like.numel() > LARGEST
        or torch.is_inference_mode_enabled()
    ):
        return None
    buffer = _BUFFERS.by_dtype.get(dtype)
    if buffer is None or buffer.numel() < like.numel():
        buffer = torch.empty(like.numel(), dtype=dtype)
        if type(buffer) is not Tensor:  # inside a mode that makes tensors without memory
            return None
        _BUFFERS.by_dtype[dtype] = buffer
    return buffer[: like.numel()].view(like.shape)
