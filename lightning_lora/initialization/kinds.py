"""Which layers the initialisations beyond a plain draw can be computed for."""

from __future__ import annotations

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.layers import adapted_class
from lightning_lora.names import listed, modules_by_name
from lightning_lora.plan import Plan, Target

# Those that take any layer.
_DRAWN = ("kaiming", "gaussian", "loftq")


def check_kinds(model: nn.Module, plan: Plan, config: LoRAConfig) -> None:
    """Every target must be a matrix that maps the layer's input, for an `init` that asks for it.

    Raises:
        ConfigError: Names the targets that are none.
    """
    if config.init in _DRAWN:
        return
    modules = modules_by_name(model)
    others = [
        f"{target.name} ({target.kind})"
        for target in plan.targets
        if not _is_matrix(modules[target.name], target)
        or (config.init == "eva" and _is_read_by_attention(target, plan, modules))
    ]
    if others:
        raise ConfigError(
            f"init={config.init!r} is for linear layers, and the targets hold others: "
            f"{listed(others)}. Leave them out with exclude_modules, or use init='kaiming'."
        )


def _is_matrix(module: nn.Module, target: Target) -> bool:
    adapted = adapted_class(type(module))
    assert adapted is not None
    return (
        adapted.zero_factor == "B"
        and len(target.weights) == 1
        and len(target.A_shape) == len(target.B_shape) == 2
        and (target.slices is None or target.slices.widths is None)
    )


def _is_read_by_attention(target: Target, plan: Plan, modules: dict[str, nn.Module]) -> bool:
    """Whether PyTorch reads the layer's weight instead of giving the layer its input."""
    outer = modules.get(target.name.rpartition(".")[0])
    return any(isinstance(m, nn.MultiheadAttention) for m in (modules[target.name], outer))
