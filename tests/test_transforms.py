"""Where each operation is handled by itself, adapted layers run in ordinary operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_lora import inject_lora
from tests.models import shake


def adapted(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    inject_lora(model, r=2, alpha=6, **settings)
    shake(model)
    return model


def grads(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_dora", [False, True])
def test_selective_checkpointing(use_dora: bool) -> None:
    model, x = adapted(use_dora=use_dora), torch.randn(3, 6)
    expected = grads(model, model(x))
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    out: Any = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    found = grads(model, out)
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("use_dora", [False, True])
def test_forward_mode(use_dora: bool) -> None:
    model = adapted(use_dora=use_dora).double()
    x, direction = torch.randn(2, 3, 6, dtype=torch.float64)
    with fwad.dual_level():
        found = fwad.unpack_dual(model(fwad.make_dual(x, direction))).tangent
    _, expected = torch.autograd.functional.jvp(model, x, direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs(layout: torch.layout) -> None:
    model = adapted()
    parts = [torch.randn(n, 6) for n in (3, 5)]
    out = model[0](torch.nested.nested_tensor(parts, layout=layout))
    for found, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(found, model[0](part))
