"""Another adapter in the place of the present one, or everything as it was."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_lora.adapter_set import active_adapter, adapters_of, default_name, loaded
from lightning_lora.injection import alike, require_injection
from lightning_lora.interop import Source, load_source, read_source
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.parking import activate, refuse_unknown_base, take_out, without_base
from lightning_lora.plan import Plan
from lightning_lora.scaling import rescale, trained_scalings
from lightning_lora.sharded import whole
from lightning_lora.state import adapter_state_dict, load_adapter_state_dict


def swap_adapter(model: nn.Module, path: str | Path) -> Plan:
    """Put another adapter in the place of the present one; a merged model is merged again, from its
    exact base, and is then bitwise what a fresh merge gives.

    What the present adapter trains in place (norms, biases, heads) gets the base's values back, or
    those of the new adapter.

    To go back and forth between adapters that stay in memory, see `lightning_lora.add_adapter`; of
    several the active one is replaced, and the new one is called ``"default"`` where its settings
    are others.

    Args:
        model: The module that LoRA was injected into.
        path: As for `load_adapter`; the new adapter may have other settings.

    Returns:
        The plan of the new adapter.

    Raises:
        ConfigError: The model has no LoRA, or the present adapter has trained parameters in place
            that the new one does not have, and their base values are not known.
        CheckpointError: The new adapter is missing, damaged, or does not fit.
        TargetError: The new adapter has layers that the model has not. The model is as it was
            before, as with every error.
    """
    record = require_injection(model)
    source = read_source(Path(path), model)
    swap = _refilled if alike(model, record.config, source[0]) else _exchanged
    return swap(model, source, str(path))


def _refilled(model: nn.Module, source: Source, path: str) -> Plan:
    """Adapters with the same settings: other values in the same factors, which optimizers and
    compiled code know.
    """
    record = require_injection(model)
    merged = record.merged
    before = {name: whole(tensor).clone() for name, tensor in adapter_state_dict(model).items()}
    trained = trained_scalings(model)
    scalings = {lora: lora.scaling for lora in trained}
    unmerge_lora(model)
    try:
        plan = load_source(model, source, path, strict_base=True)
        rescale(model, trained)
        if merged:
            merge_lora(model, record.merged_into)
    except BaseException:
        unmerge_lora(model)
        load_adapter_state_dict(model, before)
        rescale(model, scalings)
        if merged:
            merge_lora(model, record.merged_into)
        raise
    return plan


def _exchanged(model: nn.Module, source: Source, path: str) -> Plan:
    """Adapters with other settings: the present one waits until the new one is in its place."""
    known, name = adapters_of(model), active_adapter(model)
    assert name is not None
    old, new = known[name], None
    merged, into = old.record.merged, old.record.merged_into
    refuse_unknown_base(old, brought=source[1])
    try:
        take_out(model, old)
        new = loaded(model, source, path, strict_base=True)
        for unknown in without_base(old):
            new.base.pop(unknown, None)
        # The layout of packed weights was held in place before.
        new.record.repacked, new.record.merge_base, new.record.merge_dtype = (
            old.record.repacked,
            old.record.merge_base,
            old.record.merge_dtype,
        )
        if merged:
            merge_lora(model, into)
    except BaseException:
        if new is not None:
            take_out(model, new)
        if not old.active:
            activate(model, old)
        if merged and not old.record.merged:
            merge_lora(model, into)
        raise
    del known[name]
    known[default_name(known)] = new
    return new.record.plan
