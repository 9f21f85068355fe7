"""What a model and its optimizer consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import inject_lora
from lightning_lora.inventory import (
    OptimizerMemory,
    optimizer_memory,
    states_of,
)
from tests.models import hugging_face, mlp

ADAM = OptimizerMemory("AdamW", {torch.float32: 8.0}, copies=False)


class _WantsAClosure(torch.optim.SGD):
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


class _Unrunnable8bit(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no GPU")


@pytest.mark.parametrize(
    ("factory", "float32", "bfloat16"),
    [
        (torch.optim.AdamW, 8, 4),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12, 6),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 2),
        (_Unrunnable8bit, 2, 2),
    ],
)
def test_state_a_parameter(factory: Any, float32: float, bfloat16: float) -> None:
    found = optimizer_memory(factory, [torch.float32, torch.bfloat16], "cpu")
    assert found.state == {torch.float32: float32, torch.bfloat16: bfloat16}
    assert found.known == (factory is not _Unrunnable8bit)


def test_eight_bit_adam_keeps_two_bytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found = optimizer_memory(bitsandbytes.optim.AdamW8bit, [torch.float32], "cuda")
    assert found.state == {torch.float32: 2.0}
    assert not found.copies


def test_what_takes_no_step_is_taken_for_adam() -> None:
    found = optimizer_memory(lambda p: _WantsAClosure(p, lr=0.1), [torch.float32], "cpu")
    assert (found.state[torch.float32], found.known) == (8, False)


@pytest.mark.parametrize(
    ("settings", "device", "copies"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"foreach": False}, "cuda", False),
        ({"fused": True}, "cuda", False),
    ],
)
def test_only_foreach_on_a_gpu_copies_parameters(
    settings: dict[str, bool], device: str, copies: bool
) -> None:
    found = optimizer_memory(lambda p: torch.optim.AdamW(p, **settings), [torch.float32], device)
    assert found.copies == copies


def test_states_of_a_model_trained_whole() -> None:
    model = mlp()
    count = sum(p.numel() for p in model.parameters())
    states = states_of(model, ADAM, torch.float32)
    assert (states.weights, states.gradients, states.optimizer) == (4 * count, 4 * count, 8 * count)
    assert states.constants == states.dequantized == 0
    assert states.update == states.largest_gradient == 4 * 80  # fc2's weight is the largest


def test_lora_keeps_states_of_what_trains_alone() -> None:
    model = mlp()
    frozen = sum(p.numel() for p in model.parameters())
    plan = inject_lora(model, r=2, alpha=4, target_modules=["fc1", "fc2"])
    states = states_of(model, ADAM, torch.float32)
    assert states.weights == 4 * (frozen + plan.lora_parameters)
    assert states.gradients == 4 * plan.lora_parameters == states.optimizer / 2


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_qlora_quantizes_frozen_linear_layers_but_the_head(name: str) -> None:
    model: Any = hugging_face(name)
    inject_lora(model, r=2, alpha=4)
    matrices = [module.weight.numel() for module in model.modules() if hasattr(module, "lora")]
    rest = sum(p.numel() for p in model.parameters()) - sum(matrices)
    plain = states_of(model, ADAM, torch.bfloat16)
    states = states_of(model, ADAM, torch.bfloat16, quantized=True)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert states.weights == pytest.approx(4 * rest + sum(matrices) * bits / 8)
    assert states.constants == pytest.approx(sum(matrices) * (bits - 4) / 8)
    assert states.dequantized == 2 * max(matrices)
    assert states.unit < plain.unit
    assert (states.gradients, states.optimizer) == (plain.gradients, plain.optimizer)
    without = states_of(model, ADAM, torch.bfloat16, quantized=True, double_quantization=False)
    assert without.constants == pytest.approx(sum(matrices) * 0.5 / 8)


def test_layers_of_a_transformer_are_units_and_the_rest_is_root() -> None:
    model = hugging_face("llama")
    layers: Any = model.get_submodule("model.layers")
    states = states_of(model, ADAM, torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in layers[0].parameters())
    assert states.unit == states.unit_gradients == 2 * layer
    assert states.root == states.root_gradients == 2 * (count - 2 * layer)


def test_late_units_are_told_from_the_largest() -> None:
    sizes = (40, 2, 3, 2)
    model = nn.ModuleDict(
        {"body": nn.ModuleList([nn.Sequential(nn.Linear(size, 1)) for size in sizes])}
    )
    states = states_of(model, ADAM, torch.float32)
    assert (states.unit, states.largest_unit) == (4 * 4, 4 * 41)
    assert (states.unit_gradients, states.largest_unit_gradients) == (4 * 4, 4 * 41)
