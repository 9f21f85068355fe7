"""Weakening or strengthening an adapter at inference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.injection import Injection, injection_of, require_injection
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.names import modules_by_name, unwrap


def scale_adapter(model: nn.Module, factor: float) -> None:
    """Weaken or strengthen the active adapter: its scaling becomes ``factor * alpha / r`` until
    this is called again; 1 is as it was trained.

    What is saved is the adapter without the factor, as in PEFT. With DoRA the factor is on the
    update of the direction. A merged model is merged again from its exact base.

    Args:
        model: A model with an active adapter.
        factor: Any finite number; 0 takes the update away, and leaves what trains in place.

    Raises:
        ConfigError: The model has no active adapter, or the factor is not finite.
    """
    if not math.isfinite(factor):
        raise ConfigError(f"factor must be a finite number, got {factor!r}")
    record = require_injection(model)
    _set(model, record, [(lora, factor * scaling) for lora, scaling in _factors(model, record)])


@contextmanager
def adapter_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """`scale_adapter` for a while: inside, the scaling is multiplied by the factor, whatever it
    was (PEFT's ``rescale_adapter_scale``). It is that of the adapter that is active at the start.

    Example:
        >>> from lightning_lora import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> plan = inject_lora(model, r=2, alpha=6, target_modules=["0"])
        >>> with adapter_scaled(model, 0.5):
        ...     model[0].lora.scaling
        1.5
        >>> model[0].lora.scaling
        3.0
    """
    record = require_injection(model)
    scalings = [(lora, lora.scaling) for lora, _ in _factors(model, record)]
    _set(model, record, [(lora, factor * scaling) for lora, scaling in scalings])
    try:
        yield
    finally:
        _set(model, record, scalings)


def _factors(model: nn.Module, record: Injection) -> list[tuple[Any, float]]:
    """The factors of the active adapter, each with the scaling that it was trained with."""
    modules = modules_by_name(model)
    return [
        (unwrap(modules[target.name].lora), target.scaling)  # type: ignore[arg-type]
        for target in record.plan.targets
    ]


def _set(model: nn.Module, record: Injection, scalings: list[tuple[Any, float]]) -> None:
    # Inside the context another adapter may have become the active one.
    merged = record.merged and injection_of(model) is record
    if merged:
        unmerge_lora(model)
    for lora, scaling in scalings:
        lora.scaling = scaling
    if merged:
        merge_lora(model, record.merged_into)
