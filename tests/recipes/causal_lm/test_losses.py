"""The cross-entropy of tokens: torch's values and gradients, with less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_lora.recipes.causal_lm import losses
from lightning_lora.recipes.causal_lm.losses import IGNORED, token_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 2**22])
def test_values_and_gradients_are_torchs(
    smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = torch.randn(9, 5, dtype=torch.float64) * 3
    targets = torch.tensor([0, 4, IGNORED, 2, 2, IGNORED, 1, 3, 0])
    weights = torch.randn(9, dtype=torch.float64)
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    found = token_cross_entropy(ours, targets, smoothing)
    expected = F.cross_entropy(theirs, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad is not None and not ours.grad[2].any()


def test_half_precision_logits_are_computed_with_in_float32() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(64, 300) * 4).bfloat16()
    targets = torch.randint(300, (64,))
    ours = logits.clone().requires_grad_()
    theirs = logits.float().requires_grad_()
    found = token_cross_entropy(ours, targets)
    expected = F.cross_entropy(theirs, targets, reduction="none")
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    expected.mean().backward()
    assert ours.grad is not None and ours.grad.dtype is torch.bfloat16
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=1e-2, atol=1e-6)


def test_nothing_of_the_logits_size_is_kept_beside_them() -> None:
    kept: list[torch.Tensor] = []
    logits = torch.randn(8, 50).bfloat16().requires_grad_()
    targets = torch.randint(50, (8,))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_cross_entropy(logits, targets)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_no_targets_give_no_loss() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    found = token_cross_entropy(logits, torch.full((3,), IGNORED))
    found.sum().backward()
    assert not found.any()
    assert logits.grad is not None and not logits.grad.any()
