"""Whether PyTorch is transforming the function that runs."""

from __future__ import annotations

import torch


def is_transformed() -> bool:
    """Whether the call is inside a transform of `torch.func` (``grad``, ``vmap``, ``jvp``), which
    differentiates or batches each operation by itself. Never while compiling, which traces through.
    """
    if torch.compiler.is_compiling():
        return False
    # What torch.autograd.Function asks before it refuses to run there.
    return torch._C._are_functorch_transforms_active()
