"""Which layers ``"all-linear"``, ``"qv"`` and ``"attention"`` mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.heads import output_heads
from lightning_lora.layers import adapted_class, supported_layers
from lightning_lora.matching import in_attention, inside, is_query_or_value, suggest
from lightning_lora.obstacles import holds_experts
from lightning_lora.slices import Slices

_RECURRENT = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# The fused projections of linear attention, which have gates beside W_q, W_k and W_v.
_LINEAR_ATTENTION = re.compile(r"in_proj_qkv\w*")


def preset_layers(
    preset: str,
    modules: dict[str, nn.Module],
    obstacles: dict[str, str | None],
    slices: dict[str, Slices],
) -> tuple[list[str], list[tuple[str, str]]]:
    """The layers that a preset means.

    Args:
        preset: One of ``"all-linear"``, ``"qv"`` and ``"attention"``.
        modules: The model's modules by name.
        obstacles: For each module, why it cannot be adapted, or ``None``.
        slices: The parts of fused projections that are adapted.

    Returns:
        The names of the layers, and those that the preset left out, with the reason.

    Raises:
        TargetError: There is none.
    """
    heads = output_heads(modules)
    meant = [
        name
        for name, module in modules.items()
        if _in_preset(preset, name, module, slices) and not inside(name, heads)
    ]
    asked = [name for name in meant if _is_linear(modules[name])]
    chosen = [name for name in asked if obstacles[name] is None]
    skipped = [(name, str(obstacles[name])) for name in asked if obstacles[name] is not None]
    if preset == "all-linear":
        skipped += _not_linear(modules, obstacles)
    others = [
        name
        for name in meant
        if name not in asked and obstacles[name] is None and not holds_experts(modules[name])
    ]
    if not chosen:
        raise TargetError(
            f"target_modules={preset!r} matched no layer. "
            f"{_hint(modules, obstacles, skipped, others)} Name the layers to adapt, for "
            "instance target_modules=['fc1', 'fc2']. Supported layer types: "
            f"{', '.join(supported_layers())}."
        )
    if preset == "qv":
        skipped += [(name, f"a {_kind(modules[name])}, adapted by name alone") for name in others]
        skipped += _incomplete(modules, chosen, slices)
    return chosen, skipped


def refuse_latent(names: Iterable[str]) -> None:
    """Multi-head latent attention has no W_v of its own to adapt beside W_q.

    Args:
        names: Names of the model's modules that are not left out.

    Raises:
        TargetError: Names the layer that holds W_v, and what to adapt instead.
    """
    for name in names:
        attention, _, leaf = name.rpartition(".")
        if leaf == "kv_b_proj":
            raise TargetError(
                f"target_modules='qv': {attention!r} keeps W_k and W_v together in {name!r}, "
                "behind a projection to a latent, so that W_q would be adapted without a "
                "W_v. Name the layers: target_modules=['q_proj', 'kv_b_proj'] (or 'q_b_proj')."
            )


def _is_linear(module: nn.Module) -> bool:
    """Whether the presets count a module among the linear layers, adaptable or not."""
    adapted = adapted_class(type(module))
    return isinstance(module, nn.Linear) or (adapted is not None and adapted.is_linear)


def _in_preset(preset: str, name: str, module: nn.Module, slices: dict[str, Slices]) -> bool:
    is_attention = isinstance(module, nn.MultiheadAttention)
    if preset == "qv":
        return is_query_or_value(name) or name in slices or is_attention
    return preset == "all-linear" or in_attention(name) or is_attention


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _hint(
    modules: dict[str, nn.Module],
    obstacles: dict[str, str | None],
    skipped: list[tuple[str, str]],
    others: list[str],
) -> str:
    if skipped:
        return f"{skipped[0][0]!r} cannot be adapted: {skipped[0][1]}."
    if others:
        leaves = sorted({name.rpartition(".")[-1] for name in others})
        return (
            f"Presets adapt linear layers, and {others[0]!r} is a {_kind(modules[others[0]])}, "
            f"which is adapted by name alone: target_modules={leaves}."
        )
    return suggest("query", [name for name, why in obstacles.items() if why is None])


def _not_linear(
    modules: dict[str, nn.Module], obstacles: dict[str, str | None]
) -> Iterator[tuple[str, str]]:
    for name, module in modules.items():
        if holds_experts(module):
            adaptable = obstacles[name] is None
            yield (
                name,
                "the weights of experts, which are adapted by name alone"
                if adaptable
                else "the weights of experts of a kind that cannot be adapted",
            )
        elif isinstance(module, _RECURRENT):
            yield name, f"{_kind(module)} has matrices, but not those of linear layers"


def _incomplete(
    modules: dict[str, nn.Module], chosen: list[str], slices: dict[str, Slices]
) -> Iterator[tuple[str, str]]:
    """Attention of which W_q or W_v is adapted alone, or neither."""
    parts: dict[str, set[str]] = {}
    for name in chosen:
        attention, _, leaf = name.rpartition(".")
        if isinstance(modules[name], nn.MultiheadAttention):
            continue
        is_query = re.search(r"(^|_)w?q", leaf) is not None
        own = slices[name].adapted if name in slices else ("q" if is_query else "v",)
        parts.setdefault(attention, set()).update(own)
    for attention, found in parts.items():
        if len(found & {"q", "v"}) == 1:
            has, misses = ("W_q", "W_v") if "q" in found else ("W_v", "W_q")
            yield attention, f"it has no {misses} by a known name, so that {has} is adapted alone"
    for name in modules:
        if _LINEAR_ATTENTION.fullmatch(name.rpartition(".")[-1]):
            yield name, "W_q, W_k and W_v of linear attention in one weight, adapted by name alone"
