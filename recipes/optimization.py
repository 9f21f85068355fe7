"""What every recipe optimizes with: parameter groups, and warm-up followed by linear decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_lora.errors import ConfigError


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay and those that do not.

    Biases and the weights of norms are vectors; decaying them pulls the network's offsets and
    scales towards zero and is left out, as usual.

    Args:
        model: The module whose parameters that require gradients are grouped.

    Returns:
        One or two groups for an optimizer; the second sets `weight_decay` to 0.

    Example:
        >>> groups = parameter_groups(torch.nn.Linear(2, 3))
        >>> [len(group["params"]) for group in groups], groups[1]["weight_decay"]
        ([1, 1], 0.0)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed: dict[str, Any] = {"params": [p for p in trained if p.ndim > 1]}
    plain: dict[str, Any] = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def build_optimizer(
    model: torch.nn.Module,
    optimizer: Callable[[Iterable], torch.optim.Optimizer] | None,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build the user's optimizer, or AdamW, over the parameters that are trained.

    Args:
        model: The module to train.
        optimizer: Takes parameters or groups; None means AdamW with the two values below.
        learning_rate: AdamW's learning rate; a given optimizer brings its own.
        weight_decay: AdamW's decay of matrices; a given optimizer brings its own.

    Raises:
        ConfigError: If nothing is trained.
    """
    groups = parameter_groups(model)
    if not groups:
        raise ConfigError(
            "No parameter is trained. Add LoRACallback to the trainer's callbacks, or unfreeze "
            "parameters of the model."
        )
    if optimizer is not None:
        return optimizer(groups)
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)


def warmup_linear(
    optimizer: torch.optim.Optimizer, warmup: float, total_steps: float
) -> dict[str, Any]:
    """Return Lightning's scheduler entry: linear rise to the rate, then linear fall to zero.

    Args:
        optimizer: The optimizer whose rates are scaled.
        warmup: Optimizer steps of the rise: a share of all steps below 1, else their number.
        total_steps: All optimizer steps, as `trainer.estimated_stepping_batches`.

    Raises:
        ConfigError: If `warmup` is negative or leaves no step, or the fit has no end.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = warmup_linear(sgd, warmup=2, total_steps=4)["scheduler"]
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     sgd.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.5]
    """
    if total_steps == float("inf"):
        raise ConfigError(
            "The learning rate falls to zero at the end of the fit, and this fit has none: set "
            "trainer.max_epochs or trainer.max_steps."
        )
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    if warmup < 0 or steps > total_steps:
        raise ConfigError(
            f"warmup is {warmup:g}; the fit has {total_steps:g} optimizer steps. Give a share of "
            "them below 1, or a number of steps that is not larger."
        )

    def scale(step: int) -> float:
        if step < steps:
            return (step + 1) / steps
        return max(0.0, (total_steps - step) / max(1, total_steps - steps))

    return {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}
