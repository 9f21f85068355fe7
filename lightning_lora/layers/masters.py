"""Parameters that keep their precision and can be hidden from state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Masters(nn.Module):
    """Trained parameters beside a layer, in at least float32: casting the model to half precision
    leaves them alone, and the layer casts them to the dtype of its computation.

    Attributes:
        frozen: Names of the parameters that do not train.
        hidden: While true (they are merged into the weight), state dicts leave them out.
    """

    frozen: tuple[str, ...]
    hidden: bool

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.hidden = (), False

    @staticmethod
    def dtype_for(weight: torch.dtype) -> torch.dtype:
        """The dtype of masters beside a weight."""
        wide = weight.is_floating_point
        return torch.promote_types(weight, torch.float32) if wide else torch.float32

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.hidden:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.hidden:
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wide = {
            name: (p.detach(), None if p.grad is None else p.grad.detach())
            for name, p in self.named_parameters()
        }
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < 4 and parameter.is_floating_point():
                # .half(), .to(bfloat16) and Lightning's "bf16-true" would round the masters away.
                data, grad = wide[name]
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self
