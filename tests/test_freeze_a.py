"""LoRA-FA: A stays as it is drawn, and B alone trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_lora import adapter_state_dict, inject_lora, load_adapter, merge_lora, save_adapter
from lightning_lora.layers import LoRAFactors
from lightning_lora.metadata import base_fingerprint
from tests.models import assert_same, hugging_face, shake, snapshot
from tests.modules import PlainClassifier, make_lora, make_trainer
from tests.quantized import quantized_mlp

IDS = torch.arange(2, 22).reshape(2, 10)


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor | None]:
    out = model(*inputs)
    (out.logits if hasattr(out, "logits") else out).square().sum().backward()
    return {
        f"{name}.{leaf}": parameter.grad
        for name, module in model.named_modules()
        if isinstance(module, LoRAFactors)
        for leaf, parameter in module.named_parameters()
    }


CASES: dict[str, tuple[Any, Any, Tensor]] = {
    "linear": (lambda: hugging_face("llama"), "all-linear", IDS),
    "parts": (lambda: hugging_face("gpt2"), "qv", IDS),
    "embedding": (lambda: hugging_face("bert"), ["word_embeddings", "query"], IDS),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(48, 2)),
        ["0"],
        torch.linspace(-1, 1, 80).reshape(2, 4, 10),
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0),
        ["self_attn", "linear1"],
        torch.linspace(-1, 1, 80).reshape(2, 5, 8),
    ),
    "quantized": (lambda: quantized_mlp("nf4"), ["fc1", "fc2"], torch.ones(2, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_other_factor_has_the_gradient_that_it_has_in_lora(case: str) -> None:
    make, targets, inputs = CASES[case]
    found = {}
    for freeze in (False, True):
        torch.manual_seed(0)
        model = make()
        settings: dict[str, Any] = {"target_modules": targets, "modules_to_save": None}
        plan = inject_lora(model, r=2, alpha=6, seed=0, freeze_A=freeze, **settings)
        assert plan.trainable_parameters == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        shake(model)
        found[freeze] = gradients(model, inputs)
    assert set(found[True]) == set(found[False])
    for name, gradient in found[True].items():
        drawn = "B" if "word_embeddings" in name else "A"
        if name.endswith(drawn):
            assert gradient is None and found[False][name] is not None
        else:
            assert gradient is not None and gradient.any()
            torch.testing.assert_close(gradient, found[False][name])


def test_the_factors_are_described() -> None:
    plan = inject_lora(model := hugging_face("llama"), r=2, alpha=6, freeze_A=True)
    A = sum(p.numel() for n, p in model.named_parameters() if n.endswith("lora.A"))
    assert plan.trainable_parameters == plan.lora_parameters - A
    assert f"-{A:,}" in str(plan) and "stay as they start" in str(plan)


def test_a_checkpoint_holds_the_factor_and_another_draw_takes_it_over(tmp_path: Path) -> None:
    seed_everything(1)
    model = PlainClassifier("mlp")
    start = {}

    class Watch(type(make_lora())):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            start.update({n: t.clone() for n, t in adapter_state_dict(pl_module).items()})

    lora = Watch(r=4, alpha=12, verbose=False, freeze_A=True)
    trainer = make_trainer(tmp_path, lora)
    trainer.fit(model)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    for name, tensor in state.items():
        assert torch.equal(tensor, start[name]) == name.endswith("lora.A"), name
    assert any(name.endswith("lora.A") for name in state)
    optimized = checkpoint["lightning_lora"]["optimizers"][0][0]
    assert optimized and all(name.endswith("lora.B") for name in optimized)
    after = trainer.test(model, verbose=False)[0]["test_loss"]
    seed_everything(2)
    other = PlainClassifier("mlp")
    again = make_trainer(tmp_path / "other", make_lora(freeze_A=True)).test(
        other, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
    )
    assert again[0]["test_loss"] == pytest.approx(after, abs=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    fits = {}
    for name, seed, path in (("whole", 3, None), ("resumed", 4, tmp_path / "whole/epoch=0.ckpt")):
        seed_everything(seed)
        fits[name] = PlainClassifier("mlp", dropout=0.1)
        lora = make_lora(freeze_A=True, dropout=0.1)
        trainer = make_trainer(tmp_path / name, lora, max_epochs=3)
        trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
        trainer.fit(fits[name], ckpt_path=None if path is None else str(path))
    assert_same(snapshot(fits["whole"]), snapshot(fits["resumed"]))


def test_the_base_is_told_apart_from_the_frozen_factor() -> None:
    prints = set()
    for settings in ({"freeze_A": True}, {"freeze_A": False}, {"freeze_A": True, "r": 3}):
        model = hugging_face("llama")
        inject_lora(model, **{"r": 2, "alpha": 6, **settings})
        prints.add(base_fingerprint(model))
    assert len(prints) == 1


def test_frozen_factors_stay_masters(tmp_path: Path) -> None:
    model = PlainClassifier("mlp")
    lora = make_lora(freeze_A=True, frozen_dtype="bf16", merge_on_fit_end=False)
    make_trainer(tmp_path, lora, max_epochs=1, precision="bf16-mixed").fit(model)
    kinds = {n.rpartition(".")[-1]: p.dtype for n, p in model.named_parameters() if p.ndim == 2}
    assert kinds == {"weight": torch.bfloat16, "A": torch.float32, "B": torch.float32}


def test_peft_loads_it_and_it_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = hugging_face("llama")
    inject_lora(model, r=2, alpha=6, freeze_A=True)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        theirs = peft.PeftModel.from_pretrained(hugging_face("llama"), tmp_path / "adapter")
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected)
        load_adapter(other := hugging_face("llama"), tmp_path / "adapter")
        torch.testing.assert_close(other(input_ids=IDS).logits, expected)
        merge_lora(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        assert not torch.allclose(hugging_face("llama")(input_ids=IDS).logits, expected)
