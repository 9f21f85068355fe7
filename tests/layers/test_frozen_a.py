"""With a frozen A no input of an adapted layer is kept for the backward pass (LoRA-FA)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora
from tests.models import shake
from tests.quantized import quantized

ROWS, WIDTH = 64, 48


def kept_inputs(layer: Any, x: Tensor) -> int:
    """How many tensors of the size of the input are kept for backward, the parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    storages = {t.untyped_storage().data_ptr(): t for t in kept}
    found = [t for pointer, t in storages.items() if pointer not in own and t.numel() == x.numel()]
    out.sum().backward()
    assert layer.lora.B.grad is not None and layer.lora.B.grad.any()
    return len(found)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_input_of_a_linear_layer_is_not_kept(autocast: bool, init: str) -> None:
    counts = {}
    for freeze in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH))
        inject_lora(net, r=2, alpha=6, freeze_A=freeze, init=init)
        shake(net)
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            counts[freeze] = kept_inputs(net[0], x)
        assert x.grad is not None and x.grad.any()
    assert counts[False] >= 1
    assert counts[True] == 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_input_of_a_quantized_layer_is_not_kept(kind: str) -> None:
    counts = {}
    for freeze in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(quantized(nn.Linear(64, 256), kind))
        inject_lora(net, r=2, alpha=6, freeze_A=freeze)
        shake(net)
        x = torch.randn(ROWS, 64, requires_grad=True)
        counts[freeze] = kept_inputs(net[0], x)
        assert x.grad is not None and x.grad.any()
    assert counts == {False: 1, True: 0}
