"""Biases beside packed weights stay the masters that they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora import inject_lora, merge_lora, unmerge_lora
from tests.quantized import quantized_mlp

X = torch.linspace(-1, 1, 256).reshape(4, 64).to(torch.bfloat16)


def adapted(kind: str) -> Any:
    settings = {} if kind == "int8" else {"compute_dtype": torch.bfloat16}
    model: Any = quantized_mlp(kind, **settings)
    model.head.to(torch.bfloat16)
    inject_lora(model, r=3, alpha=17, target_modules=["fc1"], bias="all")
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases_of_layers_that_are_not_adapted_train_in_float32(kind: str) -> None:
    model = adapted(kind)
    before = model.fc2.bias.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(5):
        model(X).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    bias = model.fc2.bias
    assert bias in set(model.parameters()) and bias.dtype == torch.float32
    # Steps this small are lost on most elements in bfloat16.
    assert (bias != before).sum() > 0.9 * bias.numel()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert "fc2.bias" in dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_into_packed_weights_gives_the_bias_back(kind: str) -> None:
    model = adapted(kind)
    bias = model.fc1.bias
    before = bias.detach().clone()
    merge_lora(model, "requantized")
    with torch.no_grad():
        model(X)
    unmerge_lora(model)
    assert model.fc1.bias is bias and torch.equal(bias, before)
