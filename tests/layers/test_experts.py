"""LoRA on the 3-D weights of experts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError, TargetError
from lightning_lora.layers import LoRAExperts
from tests.models import assert_same, hugging_face, shake, snapshot

TOKENS = torch.arange(3, 21).reshape(2, 9)
every_model = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def updates(layer: Any, A: Tensor, B: Tensor, scaling: float) -> dict[str, Tensor]:
    """Expert by expert, B times A."""
    experts, hidden = layer.down_proj.shape[0], 16
    found = {}
    for name, columns, rows in (
        ("gate_up_proj", slice(0, hidden), slice(0, 48)),
        ("down_proj", slice(hidden, None), slice(48, None)),
    ):
        a, b = A[:, columns].chunk(experts), B[rows]
        each = [scaling * b[:, e::experts] @ a[e] for e in range(experts)]
        update = torch.stack(each)
        found[name] = update.mT if layer.is_transposed else update
    return found


@every_model
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_formula_and_its_gradients(name: str, implementation: str) -> None:
    model: Any = hugging_face(name)
    model.config._experts_implementation = implementation
    plain = copy.deepcopy(model.model.layers[0].mlp.experts)
    nn.init.normal_(plain.down_proj)
    nn.init.normal_(plain.gate_up_proj)
    model.model.layers[0].mlp.experts = copy.deepcopy(plain)
    plan = inject_lora(model, r=2, alpha=5, target_modules=["experts"])
    assert plan.targets[0].A_shape == (6, 16 + 24) and plan.targets[0].B_shape == (48 + 16, 6)
    shake(model)
    layer = model.model.layers[0].mlp.experts
    assert isinstance(layer, LoRAExperts)
    A, B = (f.detach().clone().requires_grad_() for f in layer.lora.parameters())
    deltas = updates(layer, A, B, 2.5)
    for leaf, delta in layer.delta_weights().items():
        torch.testing.assert_close(delta, deltas[leaf])
    inputs = torch.randn(7, 16), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    weights = {leaf: getattr(plain, leaf) + delta for leaf, delta in deltas.items()}
    expected = torch.func.functional_call(plain, weights, inputs)
    out = layer(*inputs)
    torch.testing.assert_close(out, expected)
    seeds = torch.randn(out.shape)
    (out * seeds).sum().backward()
    (expected * seeds).sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora.B.grad, B.grad, rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_injection_to_removal(name: str, dtype: torch.dtype) -> None:
    model: Any = hugging_face(name).to(dtype).requires_grad_(False)
    base, before = output(model), snapshot(model)
    layer = model.model.layers[1].mlp.experts
    kind = type(layer)
    inject_lora(model, r=2, alpha=6, target_modules=["experts", "q_proj"])
    assert torch.equal(output(model), base)
    again: Any = hugging_face(name).to(dtype)
    inject_lora(again, r=2, alpha=6, target_modules=["experts", "q_proj"])
    shake(model)
    adapted = output(model)
    assert not torch.equal(adapted, base)
    load_adapter_state_dict(again, adapter_state_dict(model))
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), adapted)
    merge_lora(model)
    assert type(layer) is kind
    weights = snapshot(model)
    assert not torch.equal(
        weights["model.layers.1.mlp.experts.down_proj"],
        before["model.layers.1.mlp.experts.down_proj"],
    )
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    tokens = torch.isclose(output(model), adapted, atol=tolerance, rtol=tolerance).all(-1)
    # In bfloat16 a token near a tie may be sent to another expert.
    assert tokens.float().mean() >= (1 if dtype == torch.float32 else 0.9)
    unmerge_lora(model)
    assert torch.equal(output(model), adapted)
    remove_lora(model)
    assert model.model.layers[1].mlp.experts is layer and type(layer) is kind
    assert_same(before, snapshot(model))


def test_experts_alone_merge_to_what_they_computed() -> None:
    model = hugging_face("mixtral").bfloat16()
    inject_lora(model, r=2, alpha=6, target_modules=["experts"])
    shake(model)
    adapted = output(model)
    merge_lora(model)
    assert torch.equal(output(model), adapted)


def test_presets_leave_experts_alone_and_say_so() -> None:
    plan = inject_lora(hugging_face("mixtral"), r=2, alpha=6)
    assert [name for name, _ in plan.skipped] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    text = " ".join(str(plan).split())
    assert "left alone" in text and "the weights of experts, which are adapted by name" in text


def test_dropout_is_refused() -> None:
    with pytest.raises(TargetError, match="no place for dropout"):
        inject_lora(hugging_face("mixtral"), dropout=0.1, target_modules=["experts"])


@every_model
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [["experts"], ["experts", "q_proj"]])
def test_peft_reads_what_is_saved_and_the_other_way_round(
    name: str, use_rslora: bool, targets: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = hugging_face(name)
    base = output(model)
    inject_lora(
        model,
        r=2,
        alpha=6,
        target_modules=targets,
        use_rslora=use_rslora,
        rank_pattern={r".*\.1\.mlp\.experts": 3},
        alpha_pattern={r".*\.0\.mlp\.experts": 5},
    )
    shake(model)
    adapted = output(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(hugging_face(name), tmp_path / "ours").eval()
    torch.testing.assert_close(output(theirs), adapted, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = hugging_face(name)
        plan = load_adapter(again, tmp_path / folder)
        assert [t.r for t in plan.targets if t.name.endswith("experts")] == [2, 3]
        torch.testing.assert_close(output(again), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", ["down_proj", "gate_up_proj"])
def test_an_adapter_of_one_weight_alone_does_not_fit(tmp_path: Path, weight: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{weight}"])
    peft.get_peft_model(hugging_face("mixtral"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=f"'{weight}' of 'experts' alone .*both weights"):
        load_adapter(hugging_face("mixtral"), tmp_path / "theirs")
