"""Packed examples do not see each other: neighbours are changed, and nothing else may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.causal_lm.attention import (
    BY_MASK,
    BY_ONE_ROW,
    BY_POSITIONS,
    find_way,
    packed_inputs,
    require_causal,
)
from lightning_lora.recipes.causal_lm.batches import ExampleCollator
from tests.recipes.causal_lm.material import make_model

KINDS = [
    ("gpt2", "eager"),
    ("gpt2", "sdpa"),
    ("llama", "eager"),
    ("llama", "sdpa"),
    ("opt", "eager"),
    ("opt", "sdpa"),
    ("mistral", "sdpa"),
]


def _rows(*sequences: list[list[int]]) -> list[dict[str, Any]]:
    rows = []
    for number, parts in enumerate(sequences):
        ids = [token for part in parts for token in part]
        lengths = [len(part) for part in parts]
        rows.append(
            {"input_ids": ids, "trained": [True] * len(ids), "parts": lengths, "row": number}
        )
    return rows


def _logits(model: Any, rows: list[dict[str, Any]], way: str) -> torch.Tensor:
    batch = ExampleCollator(0, packed=True)(rows)
    with torch.no_grad():
        logits = model(**packed_inputs(model, batch["input_ids"], batch["position_ids"], way))
    return logits.logits.reshape(*batch["input_ids"].shape, -1)


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_a_changed_neighbour_changes_nothing(kind: str, attention: str) -> None:
    model = make_model(kind, attention=attention)
    way = find_way(model)
    assert way == (BY_MASK if kind == "opt" else BY_POSITIONS)
    first, second, third = [5, 9, 3, 11, 30], [7, 8, 40, 41, 42, 43, 44], [12, 13, 14]
    # The second row is padded, and its padding is beside an example too.
    rows = _rows([first, second, third], [second, third])
    found = _logits(model, rows, way)
    changed = _logits(model, _rows([[50, 51, 52, 53, 54], second, third], [second, third]), way)
    assert not torch.equal(changed[0, :5], found[0, :5])
    assert torch.equal(changed[0, 5:], found[0, 5:])
    assert torch.equal(changed[1], found[1])
    later = _logits(model, _rows([first, second, [60, 61, 62]], [second, third]), way)
    assert torch.equal(later[0, :12], found[0, :12])
    for place, ids in ((slice(5, 12), second), (slice(12, 15), third), (slice(0, 5), first)):
        torch.testing.assert_close(found[0, place], _alone(model, ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :7], _alone(model, second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_all_in_one_row_is_a_way_too(kind: str) -> None:
    """What flash attention needs; the others take it as well."""
    model = make_model(kind, attention="sdpa")
    rows = _rows([[5, 9, 3], [7, 8, 40, 41]], [[12, 13, 14]])
    torch.testing.assert_close(
        _logits(model, rows, BY_ONE_ROW), _logits(model, rows, BY_POSITIONS), rtol=1e-4, atol=1e-5
    )


def test_the_mask_is_additive_where_attention_adds_it() -> None:
    model = make_model("llama", attention="eager")
    rows = _rows([[5, 9, 3], [7, 8, 40, 41]], [[12, 13, 14]])
    torch.testing.assert_close(
        _logits(model, rows, BY_MASK), _logits(model, rows, BY_POSITIONS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_that_cannot_are_refused(kind: str) -> None:
    model = make_model(kind)
    require_causal(model)
    with pytest.raises(ConfigError, match=r"cannot take several examples .* data\.packing to fals"):
        find_way(model)


def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache no mask is built: the search must not take that for separate."""
    model = make_model("llama")
    monkeypatch.setattr(
        "lightning_lora.recipes.causal_lm.attention.without_cache", lambda _: {"use_cache": True}
    )
    assert find_way(model) == BY_MASK


def test_encoders_are_no_causal_models() -> None:
    require_causal(make_model("gpt2"))
    with pytest.raises(ConfigError, match="no causal language model"):
        require_causal(make_model("bert"))


def test_the_search_leaves_modes_and_random_state_alone() -> None:
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    before = torch.get_rng_state()
    find_way(model)
    require_causal(model)
    assert model.training and not model.transformer.h[0].mlp.training
    assert model.transformer.h[1].mlp.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_half_precision_is_searched_as_well(kind: str) -> None:
    assert find_way(make_model(kind).bfloat16()) in (BY_MASK, BY_POSITIONS)
