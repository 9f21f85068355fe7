"""The gradients that a module has accumulated, as a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.sharded import local


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of this process's part of each gradient, by the parameter's name.

    They stay on the gradients' device, so that a copy in every batch makes no device wait.
    """
    return {
        name: local(parameter.grad).detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def restore_gradients(module: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Give parameters the gradients that `gradients_of` has returned."""
    for name, parameter in module.named_parameters():
        if name not in gradients:
            continue
        if gradients[name].is_sparse:
            parameter.grad = gradients[name].to(parameter.device, copy=True)
            continue
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).copy_(gradients[name])
