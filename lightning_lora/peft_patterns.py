"""PEFT's patterns of ranks and alphas: what they mean for layers that PEFT keeps otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.matching import key_matches, value_for


def patterns_of_experts(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Patterns of ranks and alphas, with keys for experts beside those for their weights."""
    owners = {p.rpartition(".")[0] for p in values.get("target_parameters") or ()}
    leaves = {p.rpartition(".")[-1] for p in values.get("target_parameters") or ()}
    changed = {}
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = dict(values.get(setting) or {})
        for key, value in tuple(pattern.items()):
            for owner in owners:
                if any(key_matches(key, f"{owner}.{leaf}") for leaf in leaves):
                    pattern[re.escape(owner)] = value
        changed[setting] = pattern
    return changed


def patterns_of_attention(
    values: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Patterns of ranks and alphas, with keys for the output projections of attention, which have
    in PEFT what the attention has.
    """
    adapted = {name.removesuffix(".lora.A") for name in state if name.endswith(".lora.A")}
    changed = {}
    for setting, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = values[setting]
        for name in adapted:
            outer, _, leaf = name.rpartition(".")
            own = value_for(pattern, outer, values[default])
            if leaf != "out_proj" or outer not in adapted:
                continue
            if value_for(pattern, name, values[default]) != own:
                pattern = {f"^{re.escape(name)}": own, **pattern}
        changed[setting] = pattern
    return changed


def used_keys(pattern: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any] | None:
    """The entries of a pattern that fit one of the layers; PEFT often writes others too."""
    used = {
        key: value
        for key, value in (pattern or {}).items()
        if any(key_matches(key, n) for n in names)
    }
    return used or None
