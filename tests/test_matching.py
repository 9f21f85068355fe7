from __future__ import annotations

import pytest

from lightning_lora.matching import (
    is_fused,
    is_query_or_value,
    key_matches,
    pattern_matches,
    suggest,
)

NAMES = ["encoder.layer.0.attention.query", "encoder.layer.0.attention.value", "encoder.out.dense"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query", "value"], ["query"]),
        (["attention.query"], ["attention.query"]),
        (["uery", "tention.query"], []),
        (r".*\.query", [r".*\.query"]),
        ("query", []),
        ("encoder", []),
    ],
)
def test_lists_hold_suffixes_and_strings_are_whole_expressions(
    patterns: str | list[str], expected: list[str]
) -> None:
    assert pattern_matches(patterns, NAMES[0]) == expected


@pytest.mark.parametrize(
    "key",
    [
        "query",
        "attention.query",
        r"layer\.[01]\..*",
        "encoder",
        "uery",
        "q|query",
        ".*query",
        "^enc.*",
    ],
)
@pytest.mark.parametrize("name", [*NAMES, "query"])
def test_keys_have_the_semantics_of_peft(key: str, name: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    # The whole key comes back where nothing matches.
    expected = other.get_pattern_key([key], name) == key and (key != name or name == "query")
    assert key_matches(key, name) == expected


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("querry", "Nearest names: query"),
        ("attention.valu", "attention.value"),
        (r".*\.querys", "query"),
        ("zzz", "The model's layers are called: dense, query, value."),
    ],
)
def test_suggestions(pattern: str, said: str) -> None:
    assert said in suggest(pattern, NAMES)


def test_suggestions_are_short() -> None:
    assert "... 88 more" in suggest("zzz", [f"block.layer_{i}" for i in range(100)])
    assert suggest("zzz", []) == "The model has no layers of a supported type."


def test_projections_by_name() -> None:
    assert is_query_or_value("h.0.q_proj")
    assert not is_query_or_value("h.0.k_proj")
    assert is_fused("h.0.c_attn")
    assert not is_fused("c_attn.proj")
    assert is_fused("h.0.attn.in_proj") and not is_fused("h.0.mamba.in_proj")
