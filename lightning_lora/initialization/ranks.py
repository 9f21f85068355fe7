"""Ranks by how much of a layer's inputs each component explains (EVA, arXiv:2410.07170, section 3).

The sum of the ranks stays as it is; a layer whose inputs lie along few directions gives ranks up to
layers whose inputs are spread over many.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.initialization.components import SPARE, Components
from lightning_lora.initialization.inputs import components_of_inputs
from lightning_lora.initialization.kinds import check_kinds
from lightning_lora.injection import injection_of
from lightning_lora.matching import N, suffix_matches
from lightning_lora.names import listed
from lightning_lora.plan import Target
from lightning_lora.targeting import make_plan


def redistribute_ranks(
    model: nn.Module,
    config: LoRAConfig,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    rho: float = 2.0,
) -> LoRAConfig:
    """Settings with the ranks given to the layers where they explain most of the inputs' variance.

    Of the components of all layers, those with the largest share of their own layer's variance are
    taken, as many as there were ranks (fewer if the inputs span fewer). A layer of which none is
    taken is left alone, and the scaling of each layer stays what it was. Run it once, on one
    device, and keep the settings: a run that resumes needs the same.

    Args:
        model: A model without LoRA, or the LightningModule around it.
        config: The settings, with the ranks to redistribute.
        batches: A few batches; they are taken one after the other. Positions that an
            ``attention_mask`` of the batch leaves out, or whose ``labels`` are -100, do not count.
        run: Runs the model on a batch.
        rho: A layer gets at most ``rho`` times its rank; at least 1. With 1 nothing changes.

    Returns:
        ``config`` with ``rank_pattern``, ``alpha_pattern`` and ``exclude_modules`` set.

    Raises:
        ConfigError: The model has LoRA already, ``rho`` is below 1, a target is not a linear layer,
            or the batches reach none.
        TargetError: As for `inject_lora`.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> with torch.no_grad():  # what the second layer is given lies on a line
        ...     _ = net[0].weight[1:].zero_()
        >>> config = redistribute_ranks(net, LoRAConfig(r=2, alpha=4, init="eva"), [x], net)
        >>> config.rank_pattern, config.alpha_pattern
        ({'0': 3, '1': 1}, {'0': 6.0, '1': 2.0})
    """
    if injection_of(model) is not None:
        raise ConfigError(
            "redistribute_ranks takes the model as it is before LoRA: call it first, and give the "
            "settings that it returns to inject_lora or LoRACallback."
        )
    if not rho >= 1:
        raise ConfigError(f"rho must be at least 1, got {rho!r}.")
    plan = make_plan(model, config)
    check_kinds(model, plan, replace(config, init="eva"))
    targets = [target for target in plan.targets if target.tied_to is None]
    most = {target.name: round(rho * target.r) for target in targets}
    keep = {name: count + SPARE for name, count in most.items()}
    found = components_of_inputs(model, keep, batches, run)
    seen = [target for target in targets if found[target.name].count]
    if not seen:
        raise ConfigError("The batches reached none of the layers to adapt; give others.")
    if len(seen) < len(targets):
        unseen = [target.name for target in targets if not found[target.name].count]
        warnings.warn(
            f"The batches never reached {listed(unseen, limit=3)}, which keep their rank.",
            stacklevel=2,
        )
    ranks = {target.name: target.r for target in targets} | _ranks(seen, most, found)
    # Layers that share a weight share its factors.
    ranks |= {t.name: ranks[t.tied_to] for t in plan.targets if t.tied_to is not None}
    return _with_ranks(config, plan.targets, ranks)


def _ranks(
    targets: Iterable[Target], most: Mapping[str, int], found: Mapping[str, Components]
) -> dict[str, int]:
    """How many of the best explaining components belong to each layer."""
    ranks = {target.name: 0 for target in targets}
    budget = sum(target.r for target in targets)
    shares = [(float(share), name) for name in ranks for share in found[name].explained(most[name])]
    # Stable: among equals (layers side by side have the same inputs) in the order of the model.
    for _, name in sorted(shares, key=lambda each: -each[0])[:budget]:
        ranks[name] += 1
    return ranks


def _with_ranks(
    config: LoRAConfig, targets: Iterable[Target], ranks: Mapping[str, int]
) -> LoRAConfig:
    dropped = [name for name, r in ranks.items() if not r]
    kept = {target.name: target for target in targets if ranks[target.name]}
    for name in dropped:
        others = [other for other in kept if suffix_matches(name, other)]
        if others:
            raise ConfigError(
                f"{name!r} gets no rank, and no name can leave it out without {others[0]!r}: call "
                "redistribute_ranks on the module around the model, or leave it out yourself."
            )
    alphas = {}
    for name, target in kept.items():
        grown = ranks[name] / target.r
        alphas[name] = target.alpha * (math.sqrt(grown) if config.use_rslora else grown)
    excluded = config.exclude_modules
    if dropped and isinstance(excluded, str):
        ends = "|".join(map(re.escape, dropped))
        excluded = rf"(?:{excluded})|(?:.*\.)?(?:{ends})"
    elif dropped:
        excluded = [*(excluded or ()), *dropped]
    return replace(
        config,
        rank_pattern=_pattern({name: ranks[name] for name in kept}, config.r),
        alpha_pattern=_pattern(alphas, config.alpha),
        exclude_modules=excluded,
    )


def _pattern(values: Mapping[str, N], default: N) -> dict[str, N] | None:
    """The keys that give each layer its value, where it is not the default."""
    # A key fits the end of a name, so that longer names come first.
    names = sorted(values, key=lambda name: -name.count("."))
    others = [name for name in names if values[name] != default]
    named = [name for name in names if any(suffix_matches(other, name) for other in others)]
    return {re.escape(name): values[name] for name in named} or None
