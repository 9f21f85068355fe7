from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_lora import inject_lora, load_adapter, merge_lora, save_adapter
from lightning_lora.conversion import prepare_conversion, write_conversion
from lightning_lora.errors import CheckpointError
from lightning_lora.injection import injection_of
from lightning_lora.offline_merging import merge_on_disk
from lightning_lora.starting import starting_state
from tests.test_interop import SIZES, assert_same, fresh, outputs, train_a_little

peft = pytest.importorskip(
    "peft", reason="PEFT is a peer to compare with, installed by the test extra"
)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))


def logits(model: nn.Module) -> Tensor:
    return outputs(model)[0]


def theirs(make: Any, folder: Path, **settings: Any) -> Tensor:
    """Logits of an adapter of PEFT's beside its base, both written to disk."""
    fresh(make).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], **settings)
    model = peft.get_peft_model(base, config)
    train_a_little(model)
    model.save_pretrained(folder / "adapter")
    return logits(model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {"train_embeddings": True}),
        (llama, {"modules_to_save": ["embed_tokens"]}),
        (llama, {"modules_to_save": ["lm_head"]}),
        (gpt2, {"train_embeddings": True}),
        (gpt2, {"modules_to_save": ["wte"]}),
    ],
)
def test_peft_keeps_what_is_tied(
    tmp_path: Path, make: Any, settings: dict[str, Any], merged: bool
) -> None:
    model = fresh(make)
    inject_lora(model, r=2, alpha=6, target_modules="qv", **settings)
    train_a_little(model)
    expected = outputs(model)
    if merged:
        merge_lora(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "adapter")
    assert_same(outputs(loaded)[:1], expected[:1])
    again = fresh(make)
    load_adapter(again, tmp_path / "adapter")
    assert_same(outputs(again)[:1], expected[:1])
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), {"train_embeddings": True}),
        # A head that is adapted cannot be tied to a copy.
        (llama, {"train_embeddings": True, "target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_what_peft_would_part_is_not_written(
    tmp_path: Path, make: Any, settings: dict[str, Any]
) -> None:
    model = fresh(make)
    inject_lora(model, **{"r": 2, "target_modules": ["query", "key"], **settings})
    with pytest.raises(CheckpointError, match=r"PEFT trains a copy of .*embed.*would leave"):
        save_adapter(model, tmp_path / "adapter")


def test_a_module_that_holds_a_weight_twice_is_copied_with_both(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x).relu())
            return out

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), Twins())

    model = fresh(make)
    inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "adapter")
    assert_same(outputs(loaded), outputs(model))
    again = fresh(make)
    load_adapter(again, tmp_path / "adapter")
    assert_same(outputs(again), outputs(model))


def test_biases_that_are_shared_train_in_place(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return BertForMaskedLM(BertConfig(**SIZES))

    model = fresh(make)
    inject_lora(model, r=2, target_modules=["query"], bias="all")
    train_a_little(model)
    save_adapter(model, tmp_path / "ours")
    again = fresh(make)
    load_adapter(again, tmp_path / "ours")
    assert_same(outputs(again), outputs(model))
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all")
    other = peft.get_peft_model(fresh(make), config)
    train_a_little(other)
    other.save_pretrained(tmp_path / "theirs")
    again = fresh(make)
    load_adapter(again, tmp_path / "theirs")
    assert_same(outputs(again), outputs(other))


def test_tied_copies_of_peft_are_one_weight(tmp_path: Path) -> None:
    expected = theirs(llama, tmp_path, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    load_adapter(model, adapter)
    assert_same([logits(model)], [expected])

    merge_on_disk(adapter, tmp_path / "merged", base)
    assert_same([logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))], [expected])

    write_conversion(prepare_conversion(adapter, base, part=""), tmp_path / "again.ckpt")
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, tmp_path / "again.ckpt")
    assert_same([logits(model)], [expected])

    around = nn.ModuleDict({"model": AutoModelForCausalLM.from_pretrained(base)})
    inject_lora(around, r=2, alpha=6, target_modules=["q_proj"], train_embeddings=True)
    state = starting_state(around, adapter)
    assert "model.model.embed_tokens.weight" in state and "model.lm_head.weight" not in state


@pytest.mark.parametrize("wanted", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_that_peft_trained_apart_are_refused_until_the_model_is_parted(
    tmp_path: Path, wanted: list[str]
) -> None:
    expected = theirs(llama, tmp_path, modules_to_save=wanted)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match=r"apart from .*tie_word_embeddings = False"):
        load_adapter(model, adapter)
    assert injection_of(model) is None
    with pytest.raises(CheckpointError, match="apart from"):
        merge_on_disk(adapter, tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="apart from"):
        prepare_conversion(adapter, base)

    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    load_adapter(model, adapter)
    assert_same([logits(model)], [expected])
    merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    assert_same([logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))], [expected])
