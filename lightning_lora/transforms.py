"""Whether PyTorch is transforming the function that runs."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_SELECTIVE = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)


def is_transformed() -> bool:
    """Whether each operation is handled by itself: inside a transform of `torch.func` (``grad``,
    ``vmap``, ``jvp``), under forward-mode differentiation, or where selective checkpointing keeps
    results that must not change any more. Never while compiling, which traces through.
    """
    if torch.compiler.is_compiling():
        return False
    # What torch.autograd.Function asks before it refuses to run there.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and isinstance(
        _get_current_dispatch_mode(), _SELECTIVE
    )
