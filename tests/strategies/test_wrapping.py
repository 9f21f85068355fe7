from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_lora import inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.strategies.wrapping import find_units
from tests.models import AttentionNet, TiedHead, hugging_face, mlp


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("bert", ["BertLayer", "BertLayer", "BertEmbeddings"]),
        ("llama", ["LlamaDecoderLayer", "LlamaDecoderLayer"]),
        ("gpt2", ["GPT2Block", "GPT2Block"]),
    ],
)
def test_blocks_of_hugging_face_models(name: str, kinds: list[str]) -> None:
    model = nn.ModuleDict({"net": hugging_face(name)})
    inject_lora(model, r=2)
    units = find_units(model, "auto")
    assert [type(unit).__name__ for unit in units.values()] == kinds


def test_elements_of_lists_where_nothing_names_the_blocks() -> None:
    assert list(find_units(AttentionNet(), "auto")) == ["encoder.layers.1", "encoder.layers.0"]
    # Bare linear layers in a row are no blocks.
    assert find_units(mlp(), "auto") == {}


def test_classes_by_name_with_their_subclasses() -> None:
    model = AttentionNet()
    inject_lora(model, r=2, target_modules=["linear1"])
    units = find_units(model, ["TransformerEncoderLayer", "MultiheadAttention"])
    names = ["encoder.layers.0", "encoder.layers.0.self_attn", "attention"]
    assert set(names) < set(units)
    order = list(units)
    assert order.index("encoder.layers.0.self_attn") < order.index("encoder.layers.0")


def test_units_by_number_of_parameters() -> None:
    model = AttentionNet()
    sizes = {
        name: sum(p.numel() for p in unit.parameters())
        for name, unit in find_units(model, 500).items()
    }
    assert sizes and all(size >= 500 for size in sizes.values())
    assert find_units(model, 10**6) == {}


def test_adapted_layers_and_tied_modules_are_no_units() -> None:
    model = TiedHead()
    inject_lora(model, r=2, target_modules=["body"])
    assert find_units(model, 1) == {}
    assert find_units(TiedHead(), ["Embedding"]) == {}


@pytest.mark.parametrize(
    ("policy", "message"),
    [(["Block"], "no module of class 'Block'"), (0, "at least 1"), (True, "auto_wrap_policy must")],
)
def test_invalid_policies(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_units(AttentionNet(), policy)
