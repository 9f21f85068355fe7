"""Several adapters on one base model, of which one at a time is active.

Each adapter has a plan of its own (ranks, targets, what trains in place may all differ). The active
one is injected as `inject_lora` does it, and everything else in the library, `LoRACallback` among
it, knows that one alone: it trains, is checkpointed, saved and merged. The others wait beside the
model with their factors, outside its parameters and its state dict. Activating an adapter puts its
factors into their layers; layers that it does not target are plain layers meanwhile.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.injection import inject_lora, injection_of, require_injection
from lightning_lora.interop import Source, finds_start_again, load_source, read_source
from lightning_lora.merging import merge_lora
from lightning_lora.names import clean_name, unwrap
from lightning_lora.parking import Waiting, activate, park, take_out, taken_from
from lightning_lora.plan import Plan
from lightning_lora.quantization import allow_repacking
from lightning_lora.sharded import is_sharded

_SET = "_lightning_lora_adapters"
# What PEFT calls no adapter at all.
BASE = "__base__"
# The name that an adapter gets which was injected before the first one was added.
DEFAULT = "default"


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    source: str | Path | LoRAConfig | None = None,
    *,
    strict_base: bool = True,
    seed: int | None = None,
    **settings: Any,
) -> Plan:
    """Give a model one more adapter. The first one is active at once; later ones wait for
    `set_adapter`, as in PEFT.

    A model that was adapted by `inject_lora` has an adapter called ``"default"``.

    Args:
        model: Any module, with adapters or without.
        adapter_name: What to call the adapter.
        source: What `load_adapter` takes (a checkpoint, or a folder in PEFT format), or the
            settings of a new adapter.
        strict_base: As for `load_adapter`.
        seed: As for `inject_lora`, of a new adapter.
        **settings: Fields of `LoRAConfig`, instead of ``source``.

    Returns:
        The plan of the adapter.

    Raises:
        ConfigError: The name is taken or reserved, the settings are invalid, the model is sharded,
            or was adapted before with base parameters that train in place.
        TargetError: The settings do not fit the model.
        CheckpointError: The adapter on disk is missing, damaged, or does not fit. The model is as
            it was before.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan = add_adapter(model, "first", r=2, alpha=6, target_modules=["0"])
        >>> plan = add_adapter(model, "second", r=3, alpha=6, target_modules=["0", "2"])
        >>> set_adapter(model, "second")
        >>> adapter_names(model), active_adapter(model)
        (('first', 'second'), 'second')
    """
    known = adapters_of(model)
    if adapter_name in known or adapter_name == BASE or not adapter_name:
        why = "is taken" if adapter_name in known else "cannot be used"
        raise ConfigError(
            f"The adapter name {adapter_name!r} {why} ({_names(known)}). Choose another one, or "
            "call delete_adapter first."
        )
    if source is not None and settings:
        raise ConfigError("Give add_adapter either a source or keyword settings, not both.")
    _refuse_sharded(model)
    read = read_source(Path(source), model) if isinstance(source, (str, Path)) else None
    config = source if isinstance(source, LoRAConfig) else LoRAConfig.from_dict(settings)
    if (config if read is None else read[0]).loftq_iter > 1:
        raise ConfigError(
            "loftq_iter above 1 quantizes the base anew for one adapter, and several adapters "
            "share one base. Use loftq_iter=1, or inject_lora alone."
        )
    active = active_adapter(model)
    with bare(model):
        if read is None:
            inject_lora(model, config, seed=seed)
            added = taken_from(model, fresh=True)
        else:
            added = loaded(model, read, str(source), strict_base)
        # The layout of packed weights is held in place for all adapters together.
        held = (each.record.repacked for each in known.values())
        added.record.repacked = next(held, added.record.repacked)
        park(model, added)
        known[adapter_name] = added
    if active is None:
        set_adapter(model, adapter_name)
    return added.record.plan


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Make an adapter the active one; ``None`` (or ``"__base__"``) leaves the base alone.

    A merged model is merged again from its exact base, and is then bitwise what merging the adapter
    into a fresh model gives. What an adapter trains in place (biases, norms, heads) goes with it.

    Args:
        model: A model with adapters.
        adapter_name: The adapter's name.

    Raises:
        ConfigError: The model has no adapter of this name, or is sharded; or it is merged, and the
            adapter cannot be. The model is as it was before.
    """
    known = adapters_of(model)
    active = active_adapter(model)
    if adapter_name == BASE:
        adapter_name = None
    if adapter_name is not None:
        _require(known, adapter_name)
    if adapter_name == active:
        return
    _refuse_sharded(model)
    merged, base = False, None
    if active is not None:
        record = require_injection(model)
        merged, base = record.merged, record.merged_into
        park(model, known[active])
    if adapter_name is None:
        return
    try:
        activate(model, known[adapter_name])
        if merged:
            merge_lora(model, base)
    except BaseException:
        if known[adapter_name].active:
            park(model, known[adapter_name])
        if active is not None:
            activate(model, known[active])
            if merged:
                merge_lora(model, base)
        raise


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter away; if it is active, the base alone is left until `set_adapter` is called.

    Args:
        model: A model with adapters.
        adapter_name: The adapter's name.

    Raises:
        ConfigError: The model has no adapter of this name.
    """
    known = adapters_of(model)
    _require(known, adapter_name)
    if active_adapter(model) == adapter_name:
        set_adapter(model, None)
    deleted = known.pop(adapter_name)
    if not known:
        allow_repacking(model, deleted.record.repacked)
        delattr(unwrap(model), _SET)


def loaded(model: nn.Module, source: Source, path: str, strict_base: bool) -> Waiting:
    """Load an adapter into the bare model, which stays bare where that fails.

    Args:
        model: The model without an active adapter.
        source: What `read_source` gave.
        path: What to call it in errors.
        strict_base: As for `load_adapter`.
    """
    inject_lora(model, source[0], initialize=finds_start_again(source))
    added = taken_from(model, fresh=True)
    try:
        load_source(model, source, path, strict_base)
    except BaseException:
        take_out(model, added)
        raise
    return added


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's adapters, in the order in which they were added."""
    return tuple(_known(model))


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter; ``None`` where the base is alone."""
    record = injection_of(model)
    return next((name for name, each in _known(model).items() if each.record is record), None)


def adapter_of(model: nn.Module, adapter_name: str) -> Waiting:
    """An adapter by its name.

    Raises:
        ConfigError: The model has no adapter of this name.
    """
    known = _known(model)
    _require(known, adapter_name)
    return known[adapter_name]


def adapters_of(model: nn.Module) -> dict[str, Waiting]:
    """The model's adapters by name, as they are kept on the model itself, so that they travel with
    copies and pickles: what is put in or taken out here counts.

    Raises:
        ConfigError: `lightning_lora.adapter_per_row` runs on the model.
    """
    if injection_of(model) is not None:
        require_injection(model)
    known = _known(model)
    kept: dict[str, Waiting] = unwrap(model).__dict__.setdefault(_SET, {})
    # The same object at every call: callers hold it while they exchange adapters.
    for name in [name for name in kept if name not in known]:
        del kept[name]
    kept.update(known)
    return kept


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Leave the base alone for a while; the active adapter must not be merged.

    Raises:
        ConfigError: It is merged.
    """
    if (record := injection_of(model)) is not None and record.merged:
        raise ConfigError("The model is merged. Call unmerge_lora(model) first.")
    with bare(model):
        yield


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Leave the base alone for a while, merged or not."""
    active, record = active_adapter(model), injection_of(model)
    merged = record is not None and record.merged
    set_adapter(model, None)
    try:
        yield
    finally:
        if active is not None:
            set_adapter(model, active)
            if merged and record is not None:
                merge_lora(model, record.merged_into)


def _known(model: nn.Module) -> dict[str, Waiting]:
    """The model's adapters by name: also an active one that `inject_lora` has made, and no longer
    one that `remove_lora` has taken away.
    """
    record = injection_of(model)
    kept: dict[str, Waiting] = unwrap(model).__dict__.get(_SET, {})
    known = {name: each for name, each in kept.items() if not each.active or each.record is record}
    if (
        record is not None
        and not record.by_row
        and all(each.record is not record for each in known.values())
    ):
        known[default_name(known)] = taken_from(model, fresh=False)
    return known


def default_name(known: Container[str]) -> str:
    """What to call an adapter that nobody has named, beside others."""
    name = DEFAULT
    while name in known:
        name += "_"
    return name


def _require(known: dict[str, Waiting], adapter_name: str) -> None:
    if adapter_name not in known:
        raise ConfigError(f"There is no adapter {adapter_name!r} ({_names(known)}).")


def _names(known: dict[str, Waiting]) -> str:
    return f"the model has {', '.join(map(repr, known))}" if known else "the model has none"


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or hasattr(parameter, "_flat_param"):
            raise ConfigError(
                f"{clean_name(name)!r} is sharded, and a sharded model keeps the adapter that it "
                "has. Add, exchange and delete adapters in one process, or before the model is "
                "sharded."
            )
