"""How architectures lay W_q, W_k and W_v out in one fused weight.

A wrong layout would adapt the wrong rows without a sign of it, so only attention classes that are
known by name, or registered, are sliced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.layouts import LayoutOf, known_layout, thirds
from lightning_lora.matching import is_fused
from lightning_lora.slices import Slices

_REGISTERED: dict[type[nn.Module], LayoutOf] = {}


def register_fused(attention: type[nn.Module], layout: LayoutOf = thirds) -> None:
    """Say where W_q and W_v are in the fused projection of an attention class of one's own, so that
    ``target_modules="qv"`` can adapt them.

    Args:
        attention: The class of the module that holds the projection (as ``qkv``, ``c_attn``,
            ``qkv_proj``, ``query_key_value``, ``Wqkv``, ``in_proj`` or ``to_qkv``).
        layout: Called with that module and the projection's number of output rows; returns the
            number of groups and ``{"q": rows, "k": rows, "v": rows}`` of one group, in the order of
            the weight. The default: one group, all of W_q, then W_k, then W_v.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = nn.Linear(8, 24)
        >>> register_fused(Attention)
    """
    _REGISTERED[attention] = layout


def fused_projections(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the layers that hold several of W_q, W_k and W_v."""
    for name, module in modules.items():
        if is_fused(name) and not any(module.children()):
            yield name


def query_and_value(name: str, rows: int, modules: Mapping[str, nn.Module]) -> Slices:
    """The slices of a fused projection that make up W_q and W_v.

    Args:
        name: Full name of the projection.
        rows: Its number of output rows.
        modules: The model's modules by name.

    Raises:
        TargetError: The layout is not known, or not that of this layer.
    """
    attention = modules[name.rpartition(".")[0]]
    layout_of = _layout_of(type(attention))
    kind = type(attention).__name__
    if layout_of is None:
        raise TargetError(
            f"target_modules='qv': {name!r} holds several of the query, key and value projections "
            f"in one weight, and where in it is not known for {kind}. Say so with "
            f"register_fused({kind}), adapt the whole of it with target_modules='attention' or by "
            "name, or leave it out with exclude_modules."
        )
    groups, parts = layout_of(attention, rows)
    slices = Slices(tuple(parts.items()), tuple(part for part in parts if part in "qv"), groups)
    if slices.out_rows != rows or not slices.adapted:
        raise TargetError(
            f"target_modules='qv': the layout of {kind} ({groups} x {dict(parts)}) does not add up "
            f"to the {rows} rows of {name!r}. Register the right one with register_fused."
        )
    return slices


def _layout_of(attention: type[nn.Module]) -> LayoutOf | None:
    for ancestor in attention.__mro__:
        if ancestor in _REGISTERED:
            return _REGISTERED[ancestor]
        if (known := known_layout(ancestor)) is not None:
            return known
    return None
