"""Name patterns: suffixes, regular expressions, and what to suggest when they match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

N = TypeVar("N", int, float)

# Last components of the names of W_q and W_v in the architectures whose projections stand apart.
_QUERY_OR_VALUE = re.compile(
    r"(query|value)(_proj|_global)?|[qv](_proj|_lin|_head)?|w[qv]|q_attn|linear_[qv]|to_[qv]"
    r"|add_[qv]_proj|project_[qv]|(layout|projection)_(query|value)"
)
# Last components of projections that hold W_q, W_k and W_v, or two of them, in one weight.
_FUSED = re.compile(
    r"c_attn|qkv(_proj|_linear)?|query_key_value|Wq?kv|in_proj|to_q?kv|kv(_proj)?|linear_kv"
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def suffix_matches(pattern: str, name: str) -> bool:
    """Whether ``name`` is ``pattern`` or ends with it as whole components.

    >>> suffix_matches("output.dense", "layer.0.output.dense")
    True
    >>> suffix_matches("dense", "layer.0.predense")
    False
    """
    return name == pattern or name.endswith("." + pattern)


def inside(name: str, containers: Iterable[str]) -> bool:
    """Whether a module is one of ``containers`` or below one.

    >>> inside("classifier.dense", ["classifier"]), inside("classifier2", ["classifier"])
    (True, False)
    """
    return any(name == container or name.startswith(container + ".") for container in containers)


def key_matches(key: str, name: str) -> bool:
    r"""Whether a key of ``rank_pattern`` fits: a regex for the end of the name, as in PEFT.

    >>> key_matches(r"layer\.[01]\.query", "encoder.layer.1.query")
    True
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{key})", name) is not None


def value_for(pattern: Mapping[str, N] | None, name: str, default: N) -> N:
    """What ``rank_pattern`` or ``alpha_pattern`` gives a layer: the value of the first key that
    fits.
    """
    return next((v for key, v in (pattern or {}).items() if key_matches(key, name)), default)


def pattern_matches(patterns: str | Iterable[str], name: str) -> list[str]:
    """The patterns that fit ``name``: a string is one regular expression, a list holds suffixes."""
    if isinstance(patterns, str):
        return [patterns] if re.fullmatch(patterns, name) else []
    return [pattern for pattern in patterns if suffix_matches(pattern, name)]


def in_attention(name: str) -> bool:
    """Whether a component of the module's path names an attention block.

    >>> in_attention("layer.0.attention.output.dense"), in_attention("layer.0.output.dense")
    (True, False)
    """
    return any(_ATTENTION.search(component) for component in name.split(".")[:-1])


def is_query_or_value(name: str) -> bool:
    """Whether the name is one under which an architecture keeps W_q or W_v apart."""
    return _QUERY_OR_VALUE.fullmatch(name.rsplit(".", 1)[-1]) is not None


def is_fused(name: str) -> bool:
    """Whether the name is one under which an architecture keeps several of W_q, W_k and W_v in one
    weight.
    """
    leaf = name.rsplit(".", 1)[-1]
    # State-space layers have an in_proj too.
    return _FUSED.fullmatch(leaf) is not None and (leaf != "in_proj" or in_attention(name))


def suggest(pattern: str, names: Iterable[str], limit: int = 5) -> str:
    """A sentence that lists the names nearest to a pattern that matched nothing."""
    suffixes: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for width in (1, 2):
            suffixes.setdefault(".".join(parts[-width:]), name)
    candidates = [suffix for suffix in suffixes if not suffix.isdigit()]
    plain = re.sub(r"[^\w.]", "", pattern.replace("\\.", "."))
    near = difflib.get_close_matches(plain, candidates, n=limit, cutoff=0.5)
    if near:
        return f"Nearest names: {', '.join(near)} (for instance {suffixes[near[0]]!r})."
    last = sorted({name.rsplit(".", 1)[-1] for name in suffixes.values()})
    if not last:
        return "The model has no layers of a supported type."
    more = f", ... {len(last) - 12} more" if len(last) > 12 else ""
    return f"The model's layers are called: {', '.join(last[:12])}{more}."
