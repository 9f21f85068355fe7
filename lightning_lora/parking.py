"""Taking the active adapter out of a model with all that belongs to it, and putting it back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.fast_paths import leave_fast_paths
from lightning_lora.freezing import freeze
from lightning_lora.initialization import put_anew
from lightning_lora.injection import (
    ATTRIBUTE,
    Injection,
    join_targets,
    require_injection,
    swap_class,
)
from lightning_lora.layers.tokens import TokenRows
from lightning_lora.merging import unmerge_lora
from lightning_lora.names import clean_name, listed, modules_by_name, persistent_buffers, unwrap
from lightning_lora.quantization import keep_trainable, quantized_layers
from lightning_lora.removal import remove_lora
from lightning_lora.sharded import reshard, same, write
from lightning_lora.tokens import add_tokens, rows_of


@dataclass
class Waiting:
    """An adapter of a model; while it is active the model holds its factors and values too.

    Attributes:
        record: What was injected.
        factors: The factors, by the name of their target.
        rows: The rows of embeddings that train, by the name of the embedding.
        base: The base's values of what the adapter trains in place.
        trained: The adapter's values of the same, while it is not active.
        packed: The weights that LoftQ has quantized anew for it, while it is not active.
        active: Whether it is the one in the model.
    """

    record: Injection
    factors: dict[str, nn.Module]
    rows: dict[str, TokenRows] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, nn.Parameter] = field(default_factory=dict)
    active: bool = True


def taken_from(model: nn.Module, fresh: bool) -> Waiting:
    """The adapter that `inject_lora` has put into a model.

    Args:
        model: The model.
        fresh: Whether nothing was trained yet, so that what trains in place has the base's values.
    """
    record, modules = require_injection(model), modules_by_name(model)
    factors = {t.name: modules[t.name].lora for t in record.plan.targets}
    names = {parameter.name for parameter in record.plan.trained} if fresh else set()
    base = {
        clean_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if clean_name(name) in names
    }
    rows = {target.name: rows_of(modules, target) for target in record.plan.tokens}
    return Waiting(record, factors, rows, base | record.buffers)  # type: ignore[arg-type]


def park(model: nn.Module, adapter: Waiting) -> None:
    """Take the active adapter out of the model; the exact base is left.

    Raises:
        ConfigError: The base's values of what the adapter trains in place are not known.
    """
    if adapter.record.originals:
        raise ConfigError(
            "loftq_iter above 1 quantized the base anew for the adapter that the model has, so "
            "that no other adapter can share the base. Call remove_lora(model) first."
        )
    refuse_unknown_base(adapter)
    take_out(model, adapter)


def refuse_unknown_base(adapter: Waiting, brought: Collection[str] = ()) -> None:
    """Look whether the exact base can be had without an adapter.

    Args:
        adapter: The adapter.
        brought: Names of what the next adapter has values of its own for, which need no others.

    Raises:
        ConfigError: The base's values of what the adapter trains in place are not known.
    """
    missing = [name for name in without_base(adapter) if name not in brought]
    if missing:
        raise ConfigError(
            f"The adapter that the model has trains base parameters in place ({listed(missing)}), "
            "and their base values are not known any more, so it cannot be exchanged. Begin with "
            "add_adapter on the bare model, and load the adapter from its checkpoint."
        )


def without_base(adapter: Waiting) -> list[str]:
    """Names of what the adapter trains in place without known base values."""
    names = [parameter.name for parameter in adapter.record.plan.trained]
    return [name for name in names if name not in adapter.base]


def take_out(model: nn.Module, adapter: Waiting) -> None:
    """Take the active adapter out of the model; `activate` undoes it.

    What the adapter trains in place gets the base's values where they are known, and keeps the
    adapter's elsewhere.
    """
    unmerge_lora(model)
    reshard(model)
    layers, unknown = quantized_layers(model), set(without_base(adapter))
    packed = {name: layers[name].weight for name in adapter.record.originals}
    kept = {
        clean_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if clean_name(name) in unknown
    }
    remove_lora(model)
    adapter.active, adapter.trained, adapter.packed = False, kept, packed
    # A forward pass of the base alone would otherwise repack 4-bit weights, and round their scales.
    keep_trainable(model)
    adapter.trained |= _exchange(model, adapter.base)


def activate(model: nn.Module, adapter: Waiting) -> None:
    """Put an adapter back into the bare model."""
    _exchange(model, adapter.trained)
    put_anew(model, adapter.packed, adapter.record.originals)
    adapter.packed = {}
    attach(model, adapter.record, adapter.factors, adapter.rows)
    adapter.active = True


def attach(
    model: nn.Module,
    record: Injection,
    factors: dict[str, nn.Module],
    rows: dict[str, TokenRows],
) -> None:
    """Put factors and rows that were made before into a bare model, as `inject_lora` does with new
    ones.
    """
    modules = modules_by_name(model)
    keep_trainable(model)
    for target in record.plan.targets:
        module = modules[target.name]
        device = getattr(module, target.weights[0]).device
        module.lora = factors[target.name].to(device).train(module.training)
        swap_class(module)
    add_tokens(modules, record.plan.tokens, rows)
    join_targets(modules, record.plan)
    leave_fast_paths(model)
    setattr(unwrap(model), ATTRIBUTE, record)
    freeze(model, record.plan)


@torch.no_grad()
def _exchange(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put other values into parameters and buffers, and return those that were there."""
    if not values:
        return {}
    found: dict[str, Tensor] = {clean_name(n): p for n, p in model.named_parameters()}
    found |= persistent_buffers(model)
    before = {}
    for name, value in values.items():
        if name in found and not same(found[name], value):
            before[name] = found[name].detach().clone()
            write(found[name], value)
    return {name: before.get(name, values[name]) for name in values}
