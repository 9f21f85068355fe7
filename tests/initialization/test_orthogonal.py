"""Factors of which neither is zero and whose product is (PEFT's orthogonal initialisation)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors
from tests.models import hugging_face

IDS = torch.arange(2, 22).reshape(2, 10)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_starts_as_it_was(name: str) -> None:
    model = hugging_face(name)
    expected = model(input_ids=IDS).logits
    plan = inject_lora(model, r=4, alpha=12, init="orthogonal", target_modules="qv")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
    for target in plan.targets:
        layer: Any = model.get_submodule(target.name)
        assert layer.lora.A.any() and layer.lora.B.any()
        assert layer.delta_weight().norm() < 1e-6
        for part in layer.lora.A.split(4):
            product = layer.lora.B @ part
            assert product.norm() < 1e-6 * layer.lora.B.norm() * part.norm() * 10
    model(input_ids=IDS).logits.square().sum().backward()
    for module in model.modules():
        if isinstance(module, LoRAFactors):
            assert module.A.grad is not None and module.A.grad.any() and module.B.grad.any()


def test_values_have_the_spread_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(600, 500)), nn.Sequential(nn.Linear(600, 500))
    inject_lora(ours, r=8, alpha=12, init="orthogonal")
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal")
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    pairs = [
        (ours[0].lora.A, layer.lora_A.default.weight),
        (ours[0].lora.B, layer.lora_B.default.weight),
    ]
    for mine, other in pairs:
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.std(), other.std(), rtol=0.1, atol=0.0)
        # Half the directions are used: the rank is r / 2 in both.
        assert torch.linalg.matrix_rank(mine) == torch.linalg.matrix_rank(other) == 4


def test_the_draw_depends_on_the_seed_and_the_layer_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        inject_lora(net, r=2, init="orthogonal", seed=seed)
        states.append((net[0].lora.A.clone(), net[1].lora.A.clone(), net[0].lora.B.clone()))
    assert all(map(torch.equal, states[0], states[1]))
    assert not any(map(torch.equal, states[0], states[2]))
    assert not torch.equal(states[0][0], states[0][1])


def test_odd_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs even ranks, got 3, 5"):
        LoRAConfig(r=3, rank_pattern={"query": 5, "key": 2}, init="orthogonal")
