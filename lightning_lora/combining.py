"""Adapters combined into a new one: PEFT's ``add_weighted_adapter``.

Of adapters with updates ``s_i B_i A_i`` and weights w_i, all but ``"linear"`` are about the sum
``sum_i w_i s_i B_i A_i``: ``"cat"`` is that sum, with ranks that add up, and ``"svd"`` the best
approximation of a given rank. ``"linear"`` adds the factors themselves, which is the sum only where
the factors have much in common: ``A = sum_i sign(w_i) sqrt|w_i s_i| A_i`` and ``B = sum_i sqrt|w_i
s_i| B_i``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter_set import adapter_of, add_adapter, bare
from lightning_lora.analysis import decompose_product
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.names import listed, modules_by_name
from lightning_lora.parking import Waiting
from lightning_lora.plan import Plan, Target
from lightning_lora.slices import Slices
from lightning_lora.targeting import make_plan

COMBINATIONS = ("linear", "cat", "svd")


@dataclass(frozen=True)
class Share:
    """What one adapter adds to a layer.

    Attributes:
        A: Shape ``(r, in)``, or as the layer keeps it.
        B: Shape ``(out, r)``, likewise.
        weight: w s.
    """

    A: Tensor
    B: Tensor
    weight: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.B.shape[1]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
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
        combination_type: ``"linear"`` (needs equal ranks), ``"cat"`` or ``"svd"``.
        svd_rank: Rank of the approximation; by default the largest among the adapters' in the
            layer.

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
    if combination_type not in COMBINATIONS:
        known = ", ".join(map(repr, COMBINATIONS))
        raise ConfigError(f"combination_type must be one of {known}, got {combination_type!r}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"Give each adapter a weight: got {len(adapters)} adapters and {len(weights)} weights."
        )
    if svd_rank is not None and svd_rank < 1:
        raise ConfigError(f"svd_rank must be at least 1, got {svd_rank}")
    found = {name: adapter_of(model, name) for name in adapters}
    for name, adapter in found.items():
        _check(name, adapter)
    shares, targets = _shares([found[name] for name in adapters], adapters, weights)
    if combination_type == "linear":
        _check_ranks(shares)
    combined = {
        name: _combined(targets[name], own, combination_type, svd_rank)
        for name, own in shares.items()
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
            own = Share(factors.A.detach(), factors.B.detach(), weight * factors.scaling)
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


def _check_ranks(shares: dict[str, list[Share]]) -> None:
    unequal = [name for name, own in shares.items() if len({share.r for share in own}) > 1]
    if unequal:
        raise ConfigError(
            f"combination_type='linear' needs adapters of one rank; they differ in "
            f"{listed(unequal, limit=3)}. Use 'cat', or 'svd'."
        )


def _combined(
    target: Target, shares: list[Share], combination_type: str, svd_rank: int | None
) -> tuple[Tensor, Tensor]:
    if combination_type == "linear":
        roots = [math.sqrt(abs(share.weight)) for share in shares]
        signs = [math.copysign(root, s.weight) for root, s in zip(roots, shares, strict=True)]
        A = sum(share.A * sign for share, sign in zip(shares, signs, strict=True))
        B = sum(share.B * root for share, root in zip(shares, roots, strict=True))
        assert isinstance(A, Tensor) and isinstance(B, Tensor)
        return A, B
    A = torch.cat([_by_part(s.A, s, target.slices) * s.weight for s in shares], dim=1).flatten(0, 1)
    B = torch.cat([share.B for share in shares], dim=1)
    if combination_type == "cat":
        return A, B
    return _truncated(A, B, target.slices, svd_rank or max(share.r for share in shares))


def _by_part(A: Tensor, share: Share, slices: Slices | None) -> Tensor:
    """A with a dimension of its parts in front (groups of a convolution, slices of a projection).

    Parts with inputs of their own lie beside one another, and are one here.
    """
    parts = 1 if slices is not None and slices.widths is not None else A.shape[0] // share.r
    return A.reshape(parts, share.r, *A.shape[1:])


def _truncated(A: Tensor, B: Tensor, slices: Slices | None, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r of each part's update."""
    pairs = [_best(down.flatten(1), up.flatten(1), r) for down, up in _parts(A, B, slices)]
    downs, ups = [down for down, _ in pairs], [up for _, up in pairs]
    beside = slices is not None and slices.widths is not None
    down, up = torch.cat(downs, dim=1 if beside else 0), torch.cat(ups)
    return (
        down.to(A.dtype).reshape(-1, *A.shape[1:]) if not beside else down.to(A.dtype),
        up.to(B.dtype).reshape(B.shape[0], r, *B.shape[2:]),
    )


def _parts(A: Tensor, B: Tensor, slices: Slices | None) -> Iterator[tuple[Tensor, Tensor]]:
    if slices is None:
        count = A.shape[0] // B.shape[1]
        yield from zip(A.chunk(count), B.chunk(count), strict=True)
    elif slices.widths is not None:
        yield from slices.blocks(A, B).values()
    else:
        sizes = dict(slices.parts)
        rows = [slices.groups * sizes[name] for name in slices.adapted]
        yield from zip(A.chunk(len(rows)), B.split(rows), strict=True)


def _best(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    found = decompose_product(A, B).top(r)
    down, up = found.V.new_zeros(r, A.shape[1]), found.U.new_zeros(B.shape[0], r)
    kept = len(found.S)
    # As in PEFT the singular values are all in B.
    down[:kept], up[:, :kept] = found.V.t(), found.U * found.S
    return down, up
