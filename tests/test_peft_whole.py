from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from lightning_lora import inject_lora, load_adapter, save_adapter
from lightning_lora.errors import CheckpointError
from lightning_lora.peft_whole import whole_from_peft
from tests.test_interop import SIZES, assert_same, fresh, outputs, train_a_little

peft = pytest.importorskip(
    "peft", reason="PEFT is a peer to compare with, installed by the test extra"
)

HEADS = {
    "SEQ_CLS": BertForSequenceClassification,
    "TOKEN_CLS": BertForTokenClassification,
    "QUESTION_ANS": BertForQuestionAnswering,
}


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modules_to_save": "auto"}, True),
        ({"modules_to_save": None}, False),
        ({"modules_to_save": None, "target_modules": ["query", "classifier", "qa_outputs"]}, False),
    ],
)
def test_a_task_is_named_where_its_head_trains_whole(
    tmp_path: Path, task: str, settings: dict[str, Any], named: bool
) -> None:
    def make() -> nn.Module:
        model: nn.Module = HEADS[task](BertConfig(**SIZES))
        return model

    model = fresh(make)
    targets = settings.get("target_modules", ["query"])
    heads = {name for name, _ in model.named_children()}
    targets = [t for t in targets if t == "query" or t in heads]
    inject_lora(model, **{"r": 2, **settings, "target_modules": targets})
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == (task if named else None)
    loaded = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "adapter")
    assert_same(outputs(loaded), outputs(model))


def bare() -> nn.Module:
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2))


def distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "name", "other"),
    [(bare, "norm", r"layers\.0\.input_layernorm"), (distilbert, "classifier", "pre_classifier")],
)
def test_names_that_reach_more_in_peft_are_not_written(
    tmp_path: Path, make: Any, name: str, other: str
) -> None:
    model = fresh(make)
    inject_lora(model, r=2, target_modules="qv", modules_to_save=[name])
    with pytest.raises(CheckpointError, match=rf"with '{name}' in modules_to_save.*{other}"):
        save_adapter(model, tmp_path / "adapter")


def test_norms_of_a_bare_model_reach_each_other(tmp_path: Path) -> None:
    model = fresh(bare)
    inject_lora(model, r=2, target_modules="qv", train_layer_norms=True)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fresh(bare), tmp_path / "adapter")
    assert_same(outputs(loaded)[:1], outputs(model)[:1])


def test_what_peft_reached_by_the_end_of_a_name_is_loaded(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    theirs = peft.get_peft_model(fresh(make), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = fresh(make)
    plan = load_adapter(model, tmp_path / "adapter")
    assert len(plan.saved_modules) == 6  # two norms in each of two layers, one behind them
    assert_same(outputs(model), outputs(theirs))


def test_names_of_whole_components_stay_as_they_are() -> None:
    owners = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.q_proj.lora", "score"]
    assert whole_from_peft(["score", "absent"], owners) == ["score"]
    assert whole_from_peft(["norm"], owners) == ["model.norm", "model.layers.0.input_layernorm"]
