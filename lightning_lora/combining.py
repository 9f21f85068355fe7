"""Adapters combined into a new one: PEFT's ``add_weighted_adapter``.

Of adapters with updates ``s_i B_i A_i`` and weights w_i, ``"cat"`` is the sum ``sum_i w_i s_i B_i
A_i``, with ranks that add up, and ``"svd"`` its best approximation of a given rank. ``"linear"``
adds the factors themselves, which is the sum only where the factors have much in common: ``A =
sum_i sign(w_i) sqrt|w_i s_i| A_i`` and ``B = sum_i sqrt|w_i s_i| B_i``. The others prune before
they add (`lightning_lora.task_arithmetic`): the factors, or with ``_svd`` the updates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.adapter_set import adapter_of, add_adapter, bare
from lightning_lora.combined_factors import Combination, Share, combined_factors
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.names import listed, modules_by_name
from lightning_lora.parking import Waiting
from lightning_lora.plan import Plan, Target
from lightning_lora.targeting import make_plan
from lightning_lora.task_arithmetic import ARITHMETIC, SIGNS
from lightning_lora.validation import choice_problems, is_number, is_rank

COMBINATIONS = (
    "linear",
    "cat",
    "svd",
    *(f"{kind}{svd}" for kind in ARITHMETIC[1:] for svd in ("", "_svd")),
)


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Plan:
    """Combine adapters of a model into a new one, which waits for `set_adapter`.

    Unlike in PEFT, where its rank is that of the widest layer, the new adapter has in each layer
    the rank that it needs there; alpha is the rank, so that s is 1 (without ``use_rslora``, which
    the others may have).

    Args:
        model: A model with adapters.
        adapters: Names of those to combine. They may adapt different layers.
        weights: A weight for each, which may be negative.
        adapter_name: What to call the new one.
        combination_type: ``"cat"``, ``"svd"``, ``"ties_svd"``, ``"dare_linear_svd"``,
            ``"dare_ties_svd"`` or ``"magnitude_prune_svd"``; or one of ``"linear"``, ``"ties"``,
            ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"``, which need equal ranks.
        svd_rank: Rank of the approximation; by default the largest among the adapters' in the
            layer.
        density: The part of the elements that pruning keeps, above 0 and up to 1.
        majority_sign_method: How TIES elects signs: ``"total"`` by the sum of the values, or
            ``"frequency"`` by their number.

    Returns:
        The new adapter's plan.

    Raises:
        ConfigError: Unknown names or combinations, ranks that do not fit, or an adapter that is no
            sum of products: with magnitudes, with parameters trained in place, of experts.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("one", "two"):
        ...     plan = add_adapter(model, name, r=2, alpha=6, target_modules=["0"])
        >>> add_weighted_adapter(model, ["one", "two"], [0.7, -0.3], "both", "cat").targets[0].r
        4
    """
    how = _combination(combination_type, svd_rank, density, majority_sign_method)
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"Give each adapter a weight: got {len(adapters)} adapters and {len(weights)} weights."
        )
    if not all(map(is_number, weights)):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)}")
    found = {name: adapter_of(model, name) for name in adapters}
    for name, adapter in found.items():
        _check(name, adapter)
    shares, targets = _shares([found[name] for name in adapters], adapters, weights)
    if how.kind != "cat" and not how.svd:
        _check_ranks(shares, combination_type)
    combined = {
        name: combined_factors(own, targets[name].slices, how) for name, own in shares.items()
    }
    # The attention of PyTorch has no place for dropout: what all of the adapters allow.
    dropout = min(adapter.record.config.dropout for adapter in found.values())
    ranks = {name: B.shape[1] for name, (_, B) in combined.items()}
    with bare(model):
        _check_ties(model, targets, shares)
        config = _config(model, dropout, ranks, targets)
        plan = add_adapter(model, adapter_name, config)
    factors: Any = adapter_of(model, adapter_name).factors
    for target in plan.targets:
        if target.tied_to is None:
            A, B = combined[target.name]
            factors[target.name].A.copy_(A)
            factors[target.name].B.copy_(B)
    return plan


def _combination(
    combination_type: str, svd_rank: int | None, density: float | None, sign: str
) -> Combination:
    """What the arguments mean.

    Raises:
        ConfigError: They mean nothing.
    """
    problems = choice_problems("combination_type", combination_type, COMBINATIONS)
    problems += choice_problems("majority_sign_method", sign, SIGNS)
    if svd_rank is not None and not is_rank(svd_rank):
        problems.append(f"svd_rank must be a whole number of at least 1, got {svd_rank!r}")
    prunes = combination_type not in ("linear", "cat", "svd")
    if prunes and not (is_number(density) and 0 < density <= 1):  # type: ignore[operator]
        problems.append(
            f"density must be a number above 0 and up to 1 for {combination_type!r}, got "
            f"{density!r}"
        )
    if problems:
        raise ConfigError("; ".join(problems))
    kind = combination_type.removesuffix("_svd") if combination_type != "svd" else "linear"
    svd = combination_type.endswith("svd")
    return Combination(kind, svd, svd_rank, 1.0 if density is None else density, sign)


def _config(
    model: nn.Module, dropout: float, ranks: dict[str, int], targets: dict[str, Target]
) -> LoRAConfig:
    """Settings that mean exactly these layers, parts and ranks on the bare model.

    Raises:
        ConfigError: No settings do.
    """
    # Not the name of a preset, whatever a layer is called.
    names = f"(?:{'|'.join(map(re.escape, targets))})"
    wrong: list[str] = []
    for target_modules in (names, "qv"):
        config = _settings(dropout, ranks, target_modules)
        try:
            planned = make_plan(model, config).targets
            more = [target.name for target in planned if target.name not in targets]
            if more:
                # A preset means layers of all blocks.
                config = replace(config, exclude_modules="|".join(map(re.escape, more)))
                planned = make_plan(model, config).targets
        except TargetError:
            continue
        found = {target.name: (target.r, target.slices) for target in planned}
        wrong = [
            name
            for name, target in targets.items()
            if found.get(name) != (ranks[target.tied_to or name], target.slices)
        ]
        if not wrong:
            return config
    raise ConfigError(
        "The adapters cannot be combined: parts of fused projections (target_modules='qv') and "
        f"layers that the preset does not mean ({listed(wrong, limit=3)}) make no one adapter. "
        "Combine adapters with the same target_modules, or merge one of them."
    )


def _settings(dropout: float, ranks: dict[str, int], target_modules: str) -> LoRAConfig:
    r = max(ranks.values(), key=list(ranks.values()).count)
    # The ^ makes a key the whole name.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r=r,
        alpha=r,
        dropout=dropout,
        target_modules=target_modules,
        rank_pattern=others or None,
        alpha_pattern={key: float(rank) for key, rank in others.items()} or None,
        modules_to_save=[],
    )


def _check(name: str, adapter: Waiting) -> None:
    record = adapter.record
    trained = [parameter.name for parameter in record.plan.trained]
    why = None
    if record.config.use_dora:
        why = "has magnitudes (use_dora), and what it adds to a weight is no product of factors"
    elif trained:
        why = f"trains base parameters in place ({listed(trained, limit=3)}), which have no sum"
    elif record.plan.tokens:
        why = "trains rows of embeddings (trainable_token_indices), which have no sum"
    elif any(t.kind.endswith("Experts") for t in record.plan.targets):
        why = "adapts experts, whose factors are kept in another order"
    elif any({n for n, _ in f.named_parameters()} != {"A", "B"} for f in adapter.factors.values()):
        why = "keeps what its factors started from (init='pissa' or 'olora'), and is no sum without"
    if why is not None:
        raise ConfigError(f"The adapter {name!r} {why}. Combine others, or merge it.")


def _shares(
    adapters: Sequence[Waiting], names: Sequence[str], weights: Sequence[float]
) -> tuple[dict[str, list[Share]], dict[str, Target]]:
    shares: dict[str, list[Share]] = {}
    targets: dict[str, Target] = {}
    for adapter, name, weight in zip(adapters, names, weights, strict=True):
        for target in adapter.record.plan.targets:
            known = targets.setdefault(target.name, target)
            if known.slices != target.slices:
                raise ConfigError(
                    f"{target.name!r}: the adapter {name!r} adapts other parts of it than the one "
                    "before it. Combine adapters with the same target_modules."
                )
            factors: Any = adapter.factors[target.name]
            own = Share(factors.A.detach(), factors.B.detach(), weight, factors.scaling)
            shares.setdefault(target.name, []).append(own)
    return shares, targets


def _check_ties(
    model: nn.Module, targets: dict[str, Target], shares: dict[str, list[Share]]
) -> None:
    """Layers with one weight would share the new factors, and so what one of them has learned."""
    modules, first = modules_by_name(model), dict[int, str]()
    for name, target in targets.items():
        other = first.setdefault(id(getattr(modules[name], target.weights[0])), name)
        factors = [[share.A.data_ptr() for share in shares[each]] for each in (name, other)]
        if factors[0] != factors[1]:
            raise ConfigError(
                f"{other!r} and {name!r} share one weight and so their factors, and not all of the "
                "adapters adapt both. Combine adapters with the same target_modules."
            )


def _check_ranks(shares: dict[str, list[Share]], combination_type: str) -> None:
    unequal = [name for name, own in shares.items() if len({share.r for share in own}) > 1]
    if unequal:
        raise ConfigError(
            f"combination_type={combination_type!r} needs adapters of one rank; they differ in "
            f"{listed(unequal, limit=3)}. Use 'cat', or one with svd."
        )
