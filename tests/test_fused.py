"""W_q and W_v inside fused projections: which rows they are, and adapters on them alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    adapter_state_dict,
    fused,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    register_fused,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.errors import TargetError
from tests.attention import adapted_rows, distinct, rows_by_role
from tests.models import assert_same, hugging_face, shake, snapshot

FUSED = [
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "gpt_bigcode, heads",
    "codegen",
    "bloom",
    "mpt",
    "persimmon",
    "falcon",
    "falcon, heads",
    "falcon, groups",
    "phi3",
    "modernbert",
    "dbrx",
    "gpt_neox_japanese",
    "openai",
    "imagegpt",
]
TOKENS = torch.arange(3, 21).reshape(2, 9)


def output(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize("architecture", [*FUSED, "deberta"])
def test_the_rows_are_those_of_the_queries_and_the_values(architecture: str) -> None:
    model = distinct(hugging_face(architecture))
    plan = inject_lora(copy.deepcopy(model), r=2, alpha=6, target_modules="qv")
    assert len(plan.targets) == 2
    for target in plan.targets:
        roles = rows_by_role(model, target.name, TOKENS[:1])
        assert min(len(rows) for rows in roles.values()) >= 4
        assert adapted_rows(target) == {"q": roles["q"], "v": roles["v"]}


@pytest.mark.parametrize("architecture", FUSED)
def test_from_injection_to_removal(architecture: str) -> None:
    model = hugging_face(architecture).requires_grad_(False)
    base, before = output(model), snapshot(model)
    plan = inject_lora(model, r=2, alpha=6, target_modules="qv")
    assert torch.equal(output(model), base)
    shake(model)
    adapted = output(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(duplicate), adapted)
    delta = model.get_submodule(plan.targets[0].name).delta_weight()
    if "Conv1D" in plan.targets[0].kind:
        delta = delta.t()
    rows = adapted_rows(plan.targets[0])
    touched = torch.zeros(delta.shape[0], dtype=torch.bool)
    touched[rows["q"] + rows["v"]] = True
    assert torch.equal(delta.any(1), touched) and not touched.all()
    merge_lora(model)
    torch.testing.assert_close(output(model), adapted, atol=1e-4, rtol=1e-4)
    unmerge_lora(model)
    assert torch.equal(output(model), adapted)
    remove_lora(model)
    assert_same(before, snapshot(model))
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3"])
def test_each_part_has_a_pair_of_factors_of_its_own(architecture: str) -> None:
    torch.manual_seed(0)
    model = hugging_face(architecture)
    target = inject_lora(model, r=2, alpha=6, target_modules="qv").targets[0]
    shake(model)
    layer: Any = model.get_submodule(target.name).double()
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora.A, layer.lora.B))
    x = torch.randn(3, 16, dtype=torch.float64)
    W = layer.weight if architecture != "gpt2" else layer.weight.t()
    expected = nn.functional.linear(x, W, layer.bias)
    start = 0
    for number, rows in enumerate(adapted_rows(target).values()):
        update = 3.0 * x @ A[2 * number : 2 * number + 2].T @ B[start : start + len(rows)].T
        expected = expected.index_add(1, torch.tensor(rows), update)
        start += len(rows)
    assert A.shape == (4, 16) and B.shape == (start, 2)
    torch.testing.assert_close(layer(x), expected)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, A.grad)
    torch.testing.assert_close(layer.lora.B.grad, B.grad)


def test_dropout_and_half_precision() -> None:
    model = hugging_face("gpt2").bfloat16()
    base = output(model)
    inject_lora(model, r=2, alpha=6, dropout=0.3, target_modules="qv")
    assert torch.equal(output(model), base)
    shake(model)
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))
    model(input_ids=TOKENS).logits.float().square().sum().backward()
    lora = model.transformer.h[0].attn.c_attn.lora
    assert lora.A.grad.dtype == torch.float32 and lora.B.grad.any()


def test_cross_attention_keeps_its_queries_apart() -> None:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    model = GPT2Model(config).eval()
    plan = inject_lora(model, r=2, alpha=6, target_modules="qv")
    found = {t.name: t.slices and t.slices.adapted for t in plan.targets}
    assert found == {
        "h.0.attn.c_attn": ("q", "v"),
        "h.0.crossattention.c_attn": ("v",),
        "h.0.crossattention.q_attn": None,
    }
    assert adapted_rows(plan.targets[1]) == {"v": list(range(16, 32))}


def test_the_table_says_which_parts() -> None:
    table = str(inject_lora(hugging_face("gpt2"), r=2, alpha=6, target_modules="qv"))
    assert "Conv1D (q, v), r=2, alpha=6" in table and "layers adapted" in table


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "falcon, groups", "phi3", "modernbert"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_computes_the_same_from_the_export(
    architecture: str, use_rslora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = hugging_face(architecture)
    base = output(model)
    settings: dict[str, Any] = {"r": 2, "alpha": 6, "use_rslora": use_rslora}
    inject_lora(model, **settings, target_modules="qv", rank_pattern={r".*\.1\..*": 3})
    shake(model)
    adapted = output(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hugging_face(architecture), tmp_path / "adapter")
    torch.testing.assert_close(output(theirs.eval()), adapted, atol=1e-5, rtol=1e-5)
    again = hugging_face(architecture)
    plan = load_adapter(again, tmp_path / "adapter")
    assert [t.r for t in plan.targets] == [4, 6] and not any(t.slices for t in plan.targets)
    torch.testing.assert_close(output(again), adapted, atol=1e-5, rtol=1e-5)


def test_the_state_holds_the_slices_alone() -> None:
    model, again = hugging_face("gpt2"), hugging_face("gpt2")
    for one in (model, again):
        inject_lora(one, r=2, alpha=6, target_modules="qv")
    shake(model)
    state = adapter_state_dict(model)
    assert {tuple(tensor.shape) for tensor in state.values()} == {(4, 16), (32, 2)}
    load_adapter_state_dict(again, state)
    assert torch.equal(output(again), output(model))


class Attention(nn.Module):
    """A user's attention, with one projection for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.qkv(x)
        return out


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "_REGISTERED", {})
    yield


@pytest.mark.usefixtures("registry")
def test_a_layout_that_is_not_known_is_an_error_until_it_is_registered() -> None:
    model = nn.ModuleDict({"attn": Attention()})
    with pytest.raises(TargetError, match=r"not known for Attention. Say so with register_fused"):
        inject_lora(model, target_modules="qv")
    register_fused(Attention)
    plan = inject_lora(copy.deepcopy(model), r=2, target_modules="qv")
    assert adapted_rows(plan.targets[0]) == {"q": [0, 1, 2, 3], "v": [8, 9, 10, 11]}
    register_fused(Attention, lambda attention, rows: (2, {"v": 1, "k": 1, "q": 4}))
    plan = inject_lora(copy.deepcopy(model), r=2, target_modules="qv")
    assert adapted_rows(plan.targets[0]) == {"v": [0, 6], "q": [2, 3, 4, 5, 8, 9, 10, 11]}
    register_fused(Attention, lambda attention, rows: (2, {"v": 1, "k": 1, "q": 3}))
    with pytest.raises(TargetError, match=r"does not add up to the 12 rows of 'attn\.qkv'"):
        inject_lora(model, target_modules="qv")
