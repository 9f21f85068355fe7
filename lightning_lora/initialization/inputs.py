"""Factors that start from the principal components of a layer's inputs (EVA, arXiv:2410.07170).

A of rank r is the r leading principal components of what the layer is given in a few batches, and B
is zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.initialization.components import SPARE, Components
from lightning_lora.injection import require_injection
from lightning_lora.names import listed, modules_by_name
from lightning_lora.plan import Target


def initialize_from_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    agree: Callable[[dict[str, Components]], dict[str, Components]] | None = None,
) -> None:
    """Start the factors of an adapted model from the inputs of its layers.

    Dropout is off meanwhile, and nothing is trained. Positions that an ``attention_mask`` of the
    batch leaves out, or whose ``labels`` are -100, do not count.

    Args:
        model: The module that LoRA was injected into, untrained (B is zero).
        batches: A few batches; they are taken one after the other.
        run: Runs the model on a batch.
        agree: Joins what several processes have found.

    Raises:
        ConfigError: The model has no LoRA, was trained already, or a layer had fewer different
            inputs than its rank.

    Example:
        >>> from lightning_lora import inject_lora
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject_lora(net, r=2, init="eva")
        >>> initialize_from_inputs(net, [torch.randn(8, 4) for _ in range(3)], net)
        >>> A = net[0].lora.A.detach()
        >>> torch.allclose(A @ A.t(), torch.eye(2), atol=1e-5)
        True
    """
    record = require_injection(model)
    modules = modules_by_name(model)
    targets = [target for target in record.plan.targets if target.tied_to is None]
    if not starts_from_zero(model):
        raise ConfigError("init='eva' starts untrained factors, and some of B is not zero.")
    keep = {target.name: target.r + SPARE for target in targets}
    found = components_of_inputs(model, keep, batches, run)
    if agree is not None:
        found = agree(found)
    with torch.no_grad():
        _write(targets, modules, found)
    record.from_inputs = True


def components_of_inputs(
    model: nn.Module, keep: Mapping[str, int], batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[str, Components]:
    """What layers are given, in evaluation mode and without gradients.

    Args:
        model: The model.
        keep: How many components of the inputs are kept, by the name of the layer.
        batches: The batches; see `initialize_from_inputs` for what counts of them.
        run: Runs the model on a batch.
    """
    modules = modules_by_name(model)
    found = {name: Components(count) for name, count in keep.items()}
    layers = {name: modules[name] for name in found}
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            with _collecting(layers, found, _counted(batch)):
                run(batch)
    return found


def starts_from_zero(model: nn.Module) -> bool:
    """Whether no factor B of an adapted model has been trained."""
    modules = modules_by_name(model)
    loras: list[Any] = [modules[t.name].lora for t in require_injection(model).plan.targets]
    return not any(bool(lora.B.any()) for lora in loras)


def _write(
    targets: Iterable[Target], modules: Mapping[str, nn.Module], found: Mapping[str, Components]
) -> None:
    unseen = [t.name for t in targets if not found[t.name].count]
    values = {t.name: found[t.name].leading(t.r) for t in targets if found[t.name].count}
    few = [
        f"{t.name} (r={t.r}, {len(values[t.name])} directions)"
        for t in targets
        if t.name in values and len(values[t.name]) < t.r
    ]
    if few:
        raise ConfigError(
            f"init='eva': the inputs of {listed(few, limit=3)} span fewer directions than the "
            "rank. Give more batches (init_batches) or a lower rank (rank_pattern), or leave them "
            "out with exclude_modules."
        )
    if unseen:
        warnings.warn(
            f"init='eva': the batches never reached {listed(unseen, limit=3)}, which start from "
            "init='kaiming' instead.",
            stacklevel=3,
        )
    for target in targets:
        if target.name in values:
            lora: Any = modules[target.name].lora
            parts = lora.A.shape[0] // target.r
            # Every part of a fused projection has the same inputs.
            lora.A.copy_(values[target.name].repeat(parts, 1))


def _counted(batch: Any) -> Tensor | None:
    """Which positions of a batch count, shape ``(batch, length)``, where the batch says so."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    counted = mask.bool()
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        counted = counted & (labels != -100).to(counted.device)
    return counted


@contextmanager
def _collecting(
    layers: Mapping[str, nn.Module], found: dict[str, Components], counted: Tensor | None
) -> Iterator[None]:
    # Layers side by side (W_q, W_k, W_v) are given one tensor, which is taken in once.
    taken: list[tuple[Tensor, Components]] = []

    def take(name: str, inputs: Sequence[Any]) -> None:
        x, own = inputs[0], found[name]
        same = next((each for tensor, each in taken if tensor is x), None)
        if same is not None and same.keep == own.keep and (own is same or not own.count):
            found[name] = same
            return
        if any(each is own for _, each in taken):
            own = found[name] = replace(own)
        taken.append((x, own))
        x = x.detach()
        if not x.isfinite().all():
            raise ConfigError(
                f"The inputs of {name!r} hold NaN or infinite values, so they have no principal "
                "components. Look for the layer or the batch that they come from."
            )
        if counted is not None and x.ndim == 3 and x.shape[:2] == counted.shape:
            x = x[counted.to(x.device)]
        # In full precision also where autocast would have it otherwise.
        with torch.autocast(x.device.type, enabled=False):
            own.add(x.reshape(-1, x.shape[-1]).float())

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: take(name, [*args, *kwargs.values()]),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
