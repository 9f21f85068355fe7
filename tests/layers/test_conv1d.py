"""LoRA on the layer that keeps its weight transposed."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.layers.conv1d import LoRAConv1D
from tests.models import assert_same, hugging_face, shake, snapshot


def pair(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Conv1D, LoRAConv1D]:
    """A plain layer and its adapted copy, the factors as they are at first."""
    torch.manual_seed(0)
    plain = Conv1D(12, 16).to(dtype)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    holder = nn.Sequential(copy.deepcopy(plain))
    inject_lora(holder, **{"r": 4, "alpha": 10, "target_modules": ["0"], **settings})
    layer = holder[0]
    assert type(layer) is LoRAConv1D
    return plain, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 5, 16), (0, 16)])
def test_at_first_the_output_is_that_of_the_base(dtype: torch.dtype, shape: Any) -> None:
    plain, layer = pair(dtype)
    plain.requires_grad_(False)
    x = torch.randn(shape, dtype=dtype)
    if len(shape) > 1:
        assert torch.equal(layer(x), plain(x))
    shake(layer)
    assert layer(x).shape == (*shape[:-1], 12)
    assert x.numel() == 0 or not torch.allclose(
        layer(x), plain(x.view(-1, 16)).view(*shape[:-1], 12)
    )


def test_the_formula_and_its_gradients() -> None:
    plain, layer = pair(torch.float64)
    shake(layer)
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora.A, layer.lora.B))
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected = y @ plain.weight + plain.bias + 2.5 * y @ A.T @ B.T
    torch.testing.assert_close(layer(x), expected)
    weights = torch.randn(3, 5, 12, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.lora.A.grad, A.grad)
    torch.testing.assert_close(layer.lora.B.grad, B.grad)
    torch.testing.assert_close(layer.delta_weight(), 2.5 * (layer.lora.B @ layer.lora.A).T)


@torch.no_grad()
def test_gpt2_from_injection_to_removal() -> None:
    model = hugging_face("gpt2")
    ids = torch.randint(0, 40, (2, 7))
    base, before = model(input_ids=ids).logits, snapshot(model)
    plan = inject_lora(model, r=4, alpha=12)
    assert sorted({t.name.rsplit(".", 2)[-1] for t in plan.targets}) == ["c_attn", "c_fc", "c_proj"]
    assert torch.equal(model(input_ids=ids).logits, base)
    shake(model)
    adapted = model(input_ids=ids).logits
    assert not torch.allclose(adapted, base, atol=1e-2)
    merge_lora(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(input_ids=ids).logits, adapted)
    remove_lora(model)
    assert_same(before, snapshot(model))


@torch.no_grad()
def test_peft_reads_what_is_saved_and_the_other_way_round(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 40, (2, 7))
    model = hugging_face("gpt2")
    inject_lora(model, r=4, alpha=12, target_modules=["c_attn", "attn.c_proj"])
    shake(model)
    adapted = model(input_ids=ids).logits
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(hugging_face("gpt2"), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = hugging_face("gpt2")
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(input_ids=ids).logits, adapted)


def test_transformers_is_not_imported_before_a_model_brings_it() -> None:
    program = (
        "import sys, torch, lightning_lora.injection\n"
        "lightning_lora.injection.inject_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), r=1)\n"
        "print('transformers.pytorch_utils' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
