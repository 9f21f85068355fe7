"""Weakening or strengthening an adapter at inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.injection import injection_of, require_injection
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.names import modules_by_name, unwrap
from lightning_lora.validation import is_number


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
    _check(factor)
    rescale(model, {lora: factor * trained for lora, trained in trained_scalings(model).items()})


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
    _check(factor)
    before = {lora: lora.scaling for lora in trained_scalings(model)}
    rescale(model, {lora: factor * scaling for lora, scaling in before.items()})
    try:
        yield
    finally:
        rescale(model, before)


def _check(factor: float) -> None:
    if not is_number(factor):
        raise ConfigError(f"factor must be a finite number, got {factor!r}")


def trained_scalings(model: nn.Module) -> dict[Any, float]:
    """The factors of the active adapter, each once, with the scaling that they were trained with.

    Raises:
        ConfigError: The model has no active adapter.
    """
    modules = modules_by_name(model)
    targets = require_injection(model).plan.targets
    return {unwrap(modules[t.name].lora): t.scaling for t in targets}  # type: ignore[arg-type]


def rescale(model: nn.Module, scalings: Mapping[Any, float]) -> None:
    """Set the scaling of factors, which may be those of an adapter that waits by now."""
    record, into = injection_of(model), None
    # Inside the context another adapter may have become the active one.
    if record is not None and record.merged and scalings.keys() & trained_scalings(model).keys():
        into = record.merged_into
        unmerge_lora(model)
    for lora, scaling in scalings.items():
        lora.scaling = scaling
    if into is not None:
        merge_lora(model, into)
