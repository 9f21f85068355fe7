"""Another adapter in the place of the present one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from lightning_lora.adapter_set import active_adapter, adapter_of
from lightning_lora.injection import injection_of, require_injection
from lightning_lora.interop import load_source, read_source
from lightning_lora.merging import merge_lora
from lightning_lora.names import clean_name
from lightning_lora.parking import activate, park
from lightning_lora.plan import Plan
from lightning_lora.removal import remove_lora


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
    config, state, _ = source
    merged, into = record.merged, record.merged_into
    if record.config == config:
        plan = load_source(model, source, str(path), strict_base=True)
        if merged:
            merge_lora(model, into)
        return plan
    active = active_adapter(model)
    assert active is not None
    present = adapter_of(model, active)
    # What the new adapter brings along needs no value in between.
    brought = {
        clean_name(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if clean_name(name) in state
    }
    leaving = replace(present, base={**brought, **present.base})
    park(model, leaving)
    try:
        plan = load_source(model, source, str(path), strict_base=True)
    except BaseException:
        if injection_of(model) is not None:
            remove_lora(model)
        activate(model, leaving)
        if merged:
            merge_lora(model, into)
        raise
    new = require_injection(model)
    # The layout of packed weights was held in place before.
    new.repacked, new.merge_base, new.merge_dtype = (
        record.repacked,
        record.merge_base,
        record.merge_dtype,
    )
    if merged:
        merge_lora(model, into)
    return plan
