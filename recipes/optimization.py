"""What every recipe optimizes with: parameter groups, LoRA+, warm-up and decay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.files import nearest

SCHEDULES = ("linear", "cosine", "constant")
_WARMUP = re.compile(r"\s*(?P<number>\d+(\.\d+)?(e-?\d+)?)\s*(?P<unit>%|epochs?|steps?)?\s*")


def parameter_groups(
    model: torch.nn.Module, lora_plus_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay and those that do not.

    Biases and the weights of norms are vectors; decaying them pulls the network's offsets and
    scales towards zero and is left out, as usual.

    Args:
        model: The module whose parameters that require gradients are grouped.
        lora_plus_ratio: Gives the factors B a group of their own, with this as its `lr_ratio`
            (LoRA+: Hayou et al. 2024, arXiv:2402.12354). They decay like other matrices.

    Returns:
        Groups for an optimizer; that of the vectors sets `weight_decay` to 0.

    Example:
        >>> groups = parameter_groups(torch.nn.Linear(2, 3))
        >>> [len(group["params"]) for group in groups], groups[1]["weight_decay"]
        ([1, 1], 0.0)
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    raised = [p for name, p in trained if lora_plus_ratio and name.endswith("lora.B")]
    apart = {id(parameter) for parameter in raised}
    rest = [parameter for _, parameter in trained if id(parameter) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": raised, "lr_ratio": lora_plus_ratio},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: torch.nn.Module,
    optimizer: Callable[[Iterable], torch.optim.Optimizer] | None,
    learning_rate: float,
    weight_decay: float,
    lora_plus_ratio: float | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Build the user's optimizer, or AdamW, over the parameters that are trained.

    Args:
        model: The module to train.
        optimizer: Takes parameters or groups; None means AdamW with the two values below.
        learning_rate: AdamW's learning rate; a given optimizer brings its own.
        weight_decay: AdamW's decay of matrices; a given optimizer brings its own.
        lora_plus_ratio: Learning rate of the factors B as a multiple of that of everything else.
        fused: Whether AdamW updates all parameters in one kernel.

    Raises:
        ConfigError: If nothing is trained, or the ratio is given and there are no factors.
    """
    groups = parameter_groups(model, lora_plus_ratio)
    if not groups:
        raise ConfigError(
            "No parameter is trained. Add LoRACallback to the trainer's callbacks, or unfreeze "
            "parameters of the model."
        )
    if lora_plus_ratio is not None and not any("lr_ratio" in group for group in groups):
        raise ConfigError(
            "lora_plus_ratio is set and the model has no LoRA factors: add LoRACallback, or leave "
            "the setting out."
        )
    if optimizer is not None:
        built = optimizer(groups)
    else:
        settings: dict[str, Any] = {"fused": True} if fused else {}
        built = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, **settings)
    # Only now is the rate known that an optimizer of the user's brings.
    for group in built.param_groups:
        group["lr"] *= group.pop("lr_ratio", 1.0)
    return built


def warmup_steps(warmup: float | str, total_steps: float, steps_per_epoch: float) -> int:
    """Return how many optimizer steps the warm-up takes.

    Args:
        warmup: A share of all steps (a number below 1, or `"6%"`), or a number of steps (from 1
            on, or `"500 steps"`), or `"2 epochs"`.
        total_steps: All optimizer steps.
        steps_per_epoch: Optimizer steps of one epoch.

    Raises:
        ConfigError: If it cannot be read, is negative, or is longer than the fit.

    Example:
        >>> [warmup_steps(value, 100, 20) for value in (0.06, 5, "10%", "2 epochs", "7 steps")]
        [6, 5, 10, 40, 7]
    """
    match = _WARMUP.fullmatch(str(warmup))
    if match is None:
        raise ConfigError(
            f"warmup is {warmup!r}. Give a share of all steps (0.06 or '6%'), a number of steps "
            "(500), or epochs ('2 epochs')."
        )
    number = float(match["number"])
    unit = match["unit"] or ("" if number < 1 else "steps")
    scale = {"": total_steps, "%": total_steps / 100, "step": 1, "epoch": steps_per_epoch}
    steps = round(number * scale[unit.rstrip("s")])
    if steps > total_steps:
        raise ConfigError(
            f"warmup is {warmup}, which is {steps} optimizer steps; the fit has {total_steps:g}. "
            "Give a share of them below 1, or a number of steps or epochs that is not larger."
        )
    return steps


def warmup_schedule(
    optimizer: torch.optim.Optimizer,
    warmup: float | str,
    total_steps: float,
    steps_per_epoch: float = 1,
    schedule: str = "linear",
) -> dict[str, Any]:
    """Return Lightning's scheduler entry: a linear rise to the rate, then the schedule's decay.

    Args:
        optimizer: The optimizer whose rates are scaled.
        warmup: Length of the rise, as in `warmup_steps`.
        total_steps: All optimizer steps, as `trainer.estimated_stepping_batches`.
        steps_per_epoch: Optimizer steps of one epoch.
        schedule: `"linear"` or `"cosine"` to zero at the end, or `"constant"`.

    Raises:
        ConfigError: If the schedule is unknown, the warm-up leaves no step, or the fit has no end.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = warmup_schedule(sgd, warmup=2, total_steps=4)["scheduler"]
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     sgd.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.5]
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"schedule is {schedule!r}{nearest(schedule, SCHEDULES)}; give one of "
            f"{', '.join(SCHEDULES)}."
        )
    if total_steps == float("inf"):
        raise ConfigError(
            "The learning rate falls to zero at the end of the fit, and this fit has none: set "
            "trainer.max_epochs or trainer.max_steps."
        )
    steps = warmup_steps(warmup, total_steps, steps_per_epoch)

    def scale(step: int) -> float:
        if step < steps:
            return (step + 1) / steps
        left = max(0.0, (total_steps - step) / max(1, total_steps - steps))
        if schedule == "constant":
            return 1.0
        return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return {"scheduler": LambdaLR(optimizer, scale), "interval": "step"}
