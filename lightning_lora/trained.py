"""Which base parameters train in place, beside the factors, and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError
from lightning_lora.heads import task_heads
from lightning_lora.matching import inside, suffix_matches, suggest
from lightning_lora.names import clean_name, parameters_of
from lightning_lora.plan import TrainedParameter

_NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def saved_modules(modules: dict[str, nn.Module], config: LoRAConfig) -> tuple[str, ...]:
    """Names of the modules that train whole, without those inside others of them.

    Raises:
        TargetError: A name in ``modules_to_save`` matched nothing.
    """
    if config.modules_to_save == "auto":
        return tuple(task_heads(modules))
    found = []
    for wanted in config.modules_to_save or ():
        names = [name for name in modules if suffix_matches(wanted, name)]
        if not names:
            raise TargetError(f"modules_to_save: {wanted!r} {_why_none(wanted, modules)}")
        found += names
    outermost = [
        name for name in found if not inside(name, [other for other in found if other != name])
    ]
    return tuple(dict.fromkeys(outermost))


def _why_none(wanted: str, modules: dict[str, nn.Module]) -> str:
    parameter = next((p for p in parameters_of(modules) if suffix_matches(wanted, p)), None)
    if parameter is None:
        return f"matched nothing. {suggest(wanted, modules)}"
    return (
        f"is a parameter ({parameter}), and only modules can be named. Let it be part of a module "
        "of its own, and name that."
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, RMSNorm or GroupNorm, by type or by its class's name."""
    name = type(module).__name__.lower()
    return isinstance(module, _NORM_TYPES) or name.endswith(("layernorm", "rmsnorm"))


def trained_parameters(
    model: nn.Module, config: LoRAConfig, saved: tuple[str, ...], targets: set[str]
) -> Iterator[TrainedParameter]:
    """The base parameters that train in place, each once and with the reason.

    Args:
        model: The model.
        config: The settings.
        saved: Names of the modules that train whole.
        targets: Names of the adapted layers.
    """
    if not (saved or config.bias != "none" or config.train_layer_norms or config.train_embeddings):
        return
    owners = dict(model.named_modules(remove_duplicate=False))
    first_names: dict[int, str] = {}
    found: set[str] = set()
    # A tied parameter has several names: it trains if it does under any of them.
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        name = clean_name(full_name)
        first_name = first_names.setdefault(id(parameter), name)
        owner_name, _, leaf = name.rpartition(".")
        owner = owners[full_name.rpartition(".")[0]]
        # Not the "relative_position_bias_table" of some attention layers: it is a matrix.
        is_bias = "bias" in leaf.split("_") and not leaf.endswith("_table")
        if first_name in found:
            continue
        if inside(owner_name, saved):
            reason = "whole"
        elif is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and owner_name in targets)
        ):
            reason = "bias"
        elif config.train_layer_norms and is_norm(owner):
            reason = "norm"
        elif config.train_embeddings and isinstance(owner, nn.Embedding):
            reason = "embedding"
        else:
            continue
        found.add(first_name)
        yield TrainedParameter(first_name, tuple(parameter.shape), reason)
