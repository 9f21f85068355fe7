"""Adapting the layers of some blocks alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lightning_lora.blocks import block_of
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.names import modules_by_name
from lightning_lora.targeting import make_plan
from tests.models import hugging_face
from tests.modules import make_lora, mlp


def adapted(model: nn.Module, wanted: Any, **settings: Any) -> list[str]:
    config = LoRAConfig(r=2, alpha=6, layers_to_transform=wanted, **settings)
    return [target.name for target in make_plan(model, config).targets]


def blocks(names: list[str]) -> set[str]:
    return {part for name in names for part in name.split(".") if part.isdigit()}


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [(0, {"0"}), (1, {"1"}), (-1, {"1"}), ([-2, -1], {"0", "1"}), ([0, -2], {"0"})],
)
def test_numbers_choose_blocks(wanted: Any, kept: set[str]) -> None:
    names = adapted(hugging_face("llama"), wanted)
    assert blocks(names) == kept and len(names) == 7 * len(kept)


def test_layers_outside_blocks_are_left_alone() -> None:
    model = hugging_face("bert")
    assert "bert.pooler.dense" in adapted(model, None)
    assert adapted(model, [0, 1]) == [n for n in adapted(model, None) if "pooler" not in n]


def test_every_stack_counts_for_itself() -> None:
    names = adapted(hugging_face("t5"), -1, target_modules=["q"])
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert {name.split(".")[2] for name in names} == {"1"}
    only = adapted(hugging_face("t5"), -1, target_modules=["q"], layers_pattern="decoder.block")
    assert only and all(name.startswith("decoder") for name in only)
    assert adapted(hugging_face("t5"), -1, layers_pattern=["decoder.block", "encoder.block"])


def test_blocks_are_the_outermost_module_list() -> None:
    mixtral = modules_by_name(hugging_face("mixtral"))
    experts = "model.layers.1.mlp.experts"
    assert experts in mixtral
    found = block_of(experts, mixtral, None)
    assert found is not None and (found.stack, found.index) == ("model.layers", 1)
    inner = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    assert adapted(inner, 1) == ["0.1", "1"]
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    assert adapted(plain, -1) == ["1.0"]
    assert adapted(mlp(), [0, -2]) == ["0", "3"]


def test_they_go_with_every_way_to_name_targets() -> None:
    model = hugging_face("gpt2")
    for targets in ("all-linear", "qv", "attention", ["c_attn"], r".*\.attn\.c_attn"):
        names = adapted(model, 1, target_modules=targets)
        assert names and all(name.startswith("transformer.h.1.") for name in names)
    assert adapted(model, 1, exclude_modules=["h.0.attn.c_attn", "mlp.c_fc"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers_to_transform": [0, 2, -3]}, ["2, -3 is no block", "0 to 1 in model.layers"]),
        (
            {"layers_to_transform": 0, "layers_pattern": "layer"},
            ["layers_pattern: 'layer' names no container", "layers"],
        ),
    ],
)
def test_errors_name_what_is_valid(settings: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(TargetError) as error:
        inject_lora(model := hugging_face("llama"), r=2, **settings)
    assert all(each in str(error.value) for each in said)
    assert not any("LoRA" in type(module).__name__ for module in model.modules())


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(TargetError, match="ModuleList or Sequential"):
        adapted(nn.ModuleDict({"fc": nn.Linear(2, 2)}), 0)


def test_all_problems_of_the_settings_are_named() -> None:
    with pytest.raises(ConfigError) as error:
        LoRAConfig(layers_to_transform=[], layers_pattern=["layers", "("])
    said = str(error.value)
    assert "layers_to_transform must be" in said and "'(' (" in said
    for wrong in (True, [1, "2"], 1.5):
        with pytest.raises(ConfigError, match="layers_to_transform must be"):
            LoRAConfig(layers_to_transform=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="set both or none"):
        LoRAConfig(layers_pattern="layers")


@pytest.mark.parametrize("wanted", [[0], 1])
def test_peft_adapts_the_same_layers(wanted: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        hugging_face("llama"),
        peft.LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=wanted,
            layers_pattern="layers",
            init_lora_weights=False,
        ),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hugging_face("llama")
    plan = load_adapter(ours, tmp_path / "theirs")
    other = make_plan(
        hugging_face("llama"),
        LoRAConfig(
            r=2,
            alpha=6,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=wanted,
            layers_pattern="layers",
        ),
    )
    assert [t.name for t in plan.targets] == [t.name for t in other.targets]
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, expected)
        save_adapter(ours, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(hugging_face("llama"), tmp_path / "ours")
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_the_callback_and_its_command_line_take_them() -> None:
    from jsonargparse import ArgumentParser

    from lightning_lora import LoRACallback

    assert make_lora(layers_to_transform=-1).config.layers_to_transform == -1
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LoRACallback, "lora")
    parsed = parser.parse_string("lora: {layers_to_transform: [-2, -1], layers_pattern: layers}")
    built = parser.instantiate_classes(parsed).lora
    assert built.config.layers_to_transform == [-2, -1] and built.config.layers_pattern == "layers"
