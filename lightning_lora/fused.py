"""How architectures lay W_q, W_k and W_v out in one fused weight.

A wrong layout would adapt the wrong rows without a sign of it, so only attention classes that are
known by name, or registered, are sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.matching import is_fused
from lightning_lora.slices import Slices

# Groups, and the rows of each part in one group, in the order of the weight.
Layout: TypeAlias = tuple[int, Mapping[str, int]]
LayoutOf: TypeAlias = Callable[[Any, int], Layout]


def thirds(attention: nn.Module, rows: int) -> Layout:
    """All rows of W_q, then of W_k, then of W_v, as many of each."""
    return 1, {"q": rows // 3, "k": rows // 3, "v": rows // 3}


def _by_head(heads: str, attention: nn.Module, rows: int) -> Layout:
    """For each head its rows of W_q, W_k and W_v."""
    groups = int(getattr(attention, heads))
    return groups, dict.fromkeys("qkv", rows // (3 * groups))


def _gpt2(attention: nn.Module, rows: int) -> Layout:
    if attention.is_cross_attention:
        return 1, {"k": rows // 2, "v": rows // 2}
    return thirds(attention, rows)


def _gpt_bigcode(attention: Any, rows: int) -> Layout:
    if attention.is_cross_attention:
        return 1, {"k": rows // 2, "v": rows // 2}
    if attention.multi_query:
        query, shared = attention.embed_dim, attention.kv_dim
        return 1, {"q": query, "k": shared, "v": shared}
    return _by_head("num_heads", attention, rows)


def _gpt_neox(attention: Any, rows: int) -> Layout:
    return rows // (3 * attention.head_size), dict.fromkeys("qkv", attention.head_size)


def _falcon(attention: Any, rows: int) -> Layout:
    size = attention.head_dim
    if attention.new_decoder_architecture:
        groups = attention.num_kv_heads
        return groups, {"q": attention.num_heads // groups * size, "k": size, "v": size}
    if attention.multi_query:
        return 1, {"q": attention.num_heads * size, "k": size, "v": size}
    return _by_head("num_heads", attention, rows)


def _phi3(attention: Any, rows: int) -> Layout:
    shared = attention.num_key_value_heads * attention.head_dim
    return 1, {"q": rows - 2 * shared, "k": shared, "v": shared}


def _codegen(attention: Any, rows: int) -> Layout:
    part = rows // 3 // attention.mp_num
    return attention.mp_num, {"q": part, "v": part, "k": part}


# Attention classes of transformers.
_LAYOUTS: dict[str, LayoutOf] = {
    "BloomAttention": lambda attention, rows: _by_head("num_heads", attention, rows),
    "CodeGenAttention": _codegen,
    "DecisionTransformerGPT2Attention": _gpt2,
    "FalconAttention": _falcon,
    "GPT2Attention": _gpt2,
    "GPTBigCodeAttention": _gpt_bigcode,
    "GPTNeoXAttention": _gpt_neox,
    "ModernBertAttention": thirds,
    "MptAttention": thirds,
    "PersimmonAttention": lambda attention, rows: _by_head("num_heads", attention, rows),
    "Phi3Attention": _phi3,
}
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
            f"target_modules='qv': {name!r} holds the query, key and value projections in one "
            f"weight, and where in it is not known for {kind}. Say so with register_fused({kind}), "
            "or adapt the whole of it with target_modules='attention' or by name."
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
        if ancestor.__module__.startswith("transformers.") and ancestor.__name__ in _LAYOUTS:
            return _LAYOUTS[ancestor.__name__]
    return None
