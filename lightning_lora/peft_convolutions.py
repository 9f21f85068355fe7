"""Grouped convolutions, whose factors PEFT lays out otherwise.

Here both factors of a convolution with g groups are grouped, so that ``B A`` is a weight of the
layer. PEFT groups B alone: its A runs over all channels, and its rank is that of all groups
together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError
from lightning_lora.matching import N, key_matches, value_for


def over_all_channels(A: Tensor, groups: int) -> Tensor:
    """The factor A as PEFT has it.

    Args:
        A: Shape ``(g * r, in / g, ...)``.
        groups: The number g of groups.

    Returns:
        Shape ``(g * r, in, ...)``, zero where a row reaches beyond the channels of its group.
    """
    channels = A.shape[1]
    wide = A.new_zeros(A.shape[0], groups * channels, *A.shape[2:])
    for number, (rows, block) in enumerate(zip(wide.chunk(groups), A.chunk(groups), strict=True)):
        rows[:, number * channels : (number + 1) * channels] = block
    return wide


def grouped_from_peft(
    modules: Mapping[str, nn.Module], config: LoRAConfig, state: Mapping[str, Tensor], source: str
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Settings and state of an adapter with the grouped convolutions as they are here.

    Args:
        modules: The modules of the model that the adapter is meant for, by name.
        config: The settings as PEFT means them.
        state: The state, whose factors A of grouped convolutions run over all channels.
        source: What to call the adapter in errors.

    Raises:
        CheckpointError: A factor uses channels of other groups: its update is no weight of the
            layer.
    """
    state, ranks, alphas = dict(state), {}, {}
    for name, module in modules.items():
        key = f"{name}.lora.A"
        if not isinstance(module, _ConvNd) or module.groups == 1 or key not in state:
            continue
        if state[key].shape[0] % module.groups or state[key].shape[1] % module.groups:
            continue  # it does not fit the layer, as the comparison with the model will say
        state[key] = _grouped(state[key], module.groups, name, source)
        alpha = value_for(config.alpha_pattern, name, config.alpha)
        shared = math.sqrt(module.groups) if config.use_rslora else module.groups
        ranks[name], alphas[name] = state[key].shape[0] // module.groups, alpha / shared
    if not ranks:
        return config, state
    return replace(
        config,
        rank_pattern=_pattern(config.rank_pattern, ranks, state, config.r),
        alpha_pattern=_pattern(config.alpha_pattern, alphas, state, config.alpha),
    ), state


def _grouped(A: Tensor, groups: int, name: str, source: str) -> Tensor:
    rows, channels = A.shape[0] // groups, A.shape[1] // groups
    blocks = [
        part[:, number * channels : (number + 1) * channels]
        for number, part in enumerate(A.split(rows))
    ]
    grouped = torch.cat(blocks)
    if int(grouped.count_nonzero()) != int(A.count_nonzero()):
        raise CheckpointError(
            f"{source} cannot be loaded: its factors of {name!r}, a convolution with {groups} "
            "groups, use the channels of other groups too, so that their update is no weight of "
            "the layer (PEFT cannot merge it either). Train it here, or leave the layer out."
        )
    return grouped


def _pattern(
    pattern: Mapping[str, N] | None,
    own: Mapping[str, N],
    state: Mapping[str, Tensor],
    default: N,
) -> dict[str, N] | None:
    """A pattern that gives some layers values of their own, and the others what it gave them."""
    adapted = [name.removesuffix(".lora.A") for name in state if name.endswith(".lora.A")]
    others = [name for name in adapted if name not in own]
    kept = {
        key: value
        for key, value in (pattern or {}).items()
        if any(key_matches(key, name) for name in others)
    }
    added = {
        f"^{re.escape(name)}": value
        for name, value in own.items()
        if value_for(kept, name, default) != value
    }
    return {**added, **kept} or None
