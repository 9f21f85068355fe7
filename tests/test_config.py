from __future__ import annotations

from typing import Any

import pytest

from lightning_lora import LoRAConfig
from lightning_lora.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": -1}, "r must be a whole number of at least 1 (or 0 to adapt no layer), got -1"),
        ({"r": 0, "bias": "lora_only"}, "bias='lora_only' trains the biases of adapted layers"),
        ({"r": 0, "rank_pattern": {"query": 4}}, "rank_pattern gives layers a rank"),
        ({"r": 2.5}, "got 2.5"),
        ({"r": True}, "got True"),
        ({"r": "8"}, "got '8'"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
        ({"alpha": float("inf")}, "got inf"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": float("nan")}, "got nan"),
        ({"bias": "lora-only"}, "did you mean 'lora_only'"),
        ({"bias": None}, "bias must be one of 'none', 'lora_only', 'all', got None"),
        ({"init": "kaimng"}, "did you mean 'kaiming'"),
        ({"target_modules": "all_linear"}, "did you mean 'all-linear'"),
        ({"target_modules": "QV"}, "did you mean 'qv'"),
        ({"target_modules": "attentions"}, "did you mean 'attention'"),
        ({"target_modules": "layer[0"}, "not a valid regular expression"),
        ({"target_modules": ""}, "target_modules must be"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": [1]}, "got [1]"),
        ({"target_modules": None}, "got None"),
        ({"exclude_modules": "*"}, "exclude_modules is not a valid regular expression"),
        ({"exclude_modules": 3}, "exclude_modules must be"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern['query'] must be a rank of at least 1"),
        ({"rank_pattern": {"a(": 4}}, "rank_pattern: 'a(' is not a valid regular expression"),
        ({"rank_pattern": {1: 4}}, "the name pattern 1 must be a string"),
        ({"rank_pattern": ["query"]}, "rank_pattern must map name patterns"),
        ({"alpha_pattern": {"query": float("nan")}}, "must be an alpha above 0, got nan"),
        ({"modules_to_save": "classifier"}, "must be 'auto', null, or a list"),
        ({"modules_to_save": [""]}, "must be 'auto', null, or a list"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"train_layer_norms": "yes"}, "train_layer_norms must be true or false"),
        ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
    ],
)
def test_each_wrong_value_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoRAConfig(**settings)
    assert said in str(error.value)
    assert str(error.value).startswith("1 problem in")


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        LoRAConfig(
            r=-1,
            alpha=-1,
            dropout=2,
            target_modules="(",
            bias="bogus",
            init="zero",
            rank_pattern={"x": -1, "(": 2},
            modules_to_save=3,  # type: ignore[arg-type]
        )
    assert str(error.value).startswith("9 problems in the LoRA settings:")
    names = ("r ", "alpha", "dropout", "target_modules", "bias", "init", "rank_pattern")
    assert all(f"\n  - {name}" in str(error.value) for name in (*names, "modules_to_save"))


@pytest.mark.parametrize(
    "value",
    [
        "all-linear",
        "qv",
        "attention",
        "attention.*",
        r".*\.attention",
        "qkv",
        ["all-linear"],
        "fc1",
    ],
)
def test_presets_names_and_expressions_are_accepted(value: str | list[str]) -> None:
    assert LoRAConfig(target_modules=value).target_modules == value


def test_tuples_and_sets_become_lists() -> None:
    config = LoRAConfig(
        target_modules=("b", "a"),  # type: ignore[arg-type]
        exclude_modules={"d", "c"},  # type: ignore[arg-type]
    )
    assert config.target_modules == ["b", "a"]
    assert config.exclude_modules == ["c", "d"]


def test_round_trip_through_primitives() -> None:
    config = LoRAConfig(r=4, alpha=32, rank_pattern={"query": 2}, modules_to_save=["head"])
    values = config.to_dict()
    assert LoRAConfig.from_dict(values) == config
    values["rank_pattern"]["query"] = 3
    assert config.rank_pattern == {"query": 2}, "the dictionary shares nothing with the settings"


@pytest.mark.parametrize(
    ("key", "said"),
    [("lora_alpha", "'lora_alpha' (did you mean 'alpha'?)"), ("xyz", "'xyz'. Known")],
)
def test_unknown_keys_are_refused(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoRAConfig.from_dict({key: 1})
    assert said in str(error.value)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6.0), (True, 12.0)])
def test_scaling(use_rslora: bool, scaling: float) -> None:
    assert LoRAConfig(use_rslora=use_rslora).scaling(4, 24) == scaling
