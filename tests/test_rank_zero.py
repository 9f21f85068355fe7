"""Baselines without factors: heads alone (probes) and biases alone (BitFit)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_lightning_module,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.adapters import read_adapter
from lightning_lora.errors import CheckpointError, TargetError
from lightning_lora.injection import injection_of
from lightning_lora.inspection import inspect_adapter
from tests.models import assert_same, hugging_face, snapshot
from tests.modules import PlainClassifier, make_lora, make_trainer

PROBE: dict[str, Any] = {"r": 0, "modules_to_save": ["4"]}
BITFIT: dict[str, Any] = {"r": 0, "bias": "all", "modules_to_save": None}


def test_the_head_of_a_task_model_alone_trains() -> None:
    model = hugging_face("bert")
    before = snapshot(model)
    plan = inject_lora(model, r=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert plan.lora_parameters == 0 and plan.trainable_parameters == 2 * 16 + 2
    assert plan.total_parameters == plan.base_parameters
    assert "0 " in str(plan) and list(adapter_state_dict(model)) == trained
    assert_same(before, snapshot(model))
    remove_lora(model)
    assert injection_of(model) is None and all(p.requires_grad for p in model.parameters())


def test_bitfit_trains_every_bias() -> None:
    model = hugging_face("bert")
    inject_lora(model, **BITFIT)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("bias")}


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(TargetError, match="Nothing would train: r=0"):
        inject_lora(hugging_face("llama"), r=0)


@pytest.mark.parametrize("settings", [PROBE, BITFIT], ids=["probe", "bitfit"])
def test_life_cycle(tmp_path: Path, settings: dict[str, Any]) -> None:
    seed_everything(1)
    model = PlainClassifier("mlp", dropout=0.1)
    base = snapshot(model)
    trainer = make_trainer(tmp_path, make_lora(**settings), max_epochs=3)
    trainer.fit(model)
    record = injection_of(model)
    assert record is not None and record.merged
    assert sum(model.losses[-8:]) < sum(model.losses[:8])
    names = {p.name for p in record.plan.trained}
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, base[name]) == (name not in names), name
    after = trainer.test(model, verbose=False)[0]["test_loss"]
    last = str(tmp_path / "last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert set(checkpoint["state_dict"]) == names and not checkpoint["lightning_lora"]["targets"]
    again = trainer.test(model, ckpt_path=last, verbose=False)[0]["test_loss"]
    assert again == pytest.approx(after, abs=1e-6)

    # In a module without a Trainer, in the network inside it, and read without a model.
    whole = load_lightning_module(PlainClassifier, last)
    inner = PlainClassifier("mlp").net
    load_adapter(inner, last)
    for name in names:
        assert torch.equal(whole.get_parameter(name), model.get_parameter(name))
        assert torch.equal(
            inner.get_parameter(name.removeprefix("net.")), whole.get_parameter(name)
        )
    described = inspect_adapter(read_adapter(last))
    assert described["layers"] == [] and described["parameters"]["factors"] == 0
    assert {row["name"] for row in described["other_tensors"]} == names


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    fits = {}
    for name, path in (("whole", None), ("resumed", tmp_path / "whole" / "epoch=0.ckpt")):
        seed_everything(3)
        fits[name] = PlainClassifier("mlp", dropout=0.1)
        trainer = make_trainer(tmp_path / name, make_lora(**BITFIT), max_epochs=3)
        trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
        trainer.fit(fits[name], ckpt_path=None if path is None else str(path))
    assert_same(snapshot(fits["whole"]), snapshot(fits["resumed"]))
    assert fits["whole"].losses[8:] == fits["resumed"].losses


@pytest.mark.parametrize(
    ("ours", "said"), [({"r": 4}, "r: 0 in the checkpoint, 4 now"), (BITFIT, "bias: 'none'")]
)
def test_other_settings_are_refused(tmp_path: Path, ours: dict[str, Any], said: str) -> None:
    make_trainer(tmp_path, make_lora(**PROBE), max_epochs=1).fit(PlainClassifier("mlp"))
    other = make_trainer(tmp_path / "other", make_lora(**{**PROBE, "bias": "none", **ours}))
    with pytest.raises(CheckpointError, match=said):
        other.fit(PlainClassifier("mlp"), ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_full_checkpoint_is_no_probe(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_epochs=1).fit(PlainClassifier("mlp"))
    with pytest.raises(CheckpointError, match="full-model checkpoint"):
        make_trainer(tmp_path / "other", make_lora(**PROBE)).fit(
            PlainClassifier("mlp"), ckpt_path=str(tmp_path / "last.ckpt")
        )


def test_merge_counts_and_changes_nothing(tmp_path: Path) -> None:
    model = hugging_face("bert")
    inject_lora(model, r=0)
    before = snapshot(model)
    merge_lora(model)
    record = injection_of(model)
    assert record is not None and record.merged
    assert_same(before, snapshot(model))
    unmerge_lora(model)
    assert not record.merged
    with pytest.raises(CheckpointError, match="PEFT's LoRA format needs adapted layers"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_merged_model_is_exported_and_the_adapter_left_out(tmp_path: Path) -> None:
    lora = make_lora(**PROBE, export_dir=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="r=0 adapts none"):
        make_trainer(tmp_path, lora, max_epochs=1).fit(PlainClassifier("mlp"))
    assert (tmp_path / "out/merged/model.safetensors").exists()
    assert not (tmp_path / "out/adapter").exists()
