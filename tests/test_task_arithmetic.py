from __future__ import annotations

import pytest
import torch

from lightning_lora.task_arithmetic import ARITHMETIC, combine


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_what_is_dropped_is_drawn_and_the_rest_rescaled(kind: str) -> None:
    torch.manual_seed(0)
    ones = torch.ones(100, 200)
    found = combine(kind, [ones], [0.5], 0.25, "total")
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(found[kept], torch.full_like(found[kept], 2.0))
    again = combine(kind, [ones], [0.5], 0.25, "total")
    assert not torch.equal(found, again)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_the_largest_elements_are_kept(kind: str) -> None:
    tensor = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    found = combine(kind, [tensor], [1.0], 0.3, "total")
    assert int((found != 0).sum()) == 600
    assert tensor[found != 0].abs().min() > tensor[found == 0].abs().max()
    assert torch.equal(found[found != 0], tensor[found != 0])


def test_signs_by_value_and_by_number() -> None:
    tensors = [torch.tensor([value]) for value in (-5.0, 1.0, 2.0)]
    assert combine("ties", tensors, [1.0, 1.0, 1.0], 1.0, "total").item() == -5
    assert combine("ties", tensors, [1.0, 2.0, 1.0], 1.0, "frequency").item() == (2 + 2) / 2


@pytest.mark.parametrize("kind", ["linear", "dare_linear", "magnitude_prune"])
def test_with_everything_kept_it_is_the_weighted_sum(kind: str) -> None:
    assert kind in ARITHMETIC
    one, two = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = combine(kind, [one, two], [0.7, -0.2], 1.0, "total")
    torch.testing.assert_close(found, 0.7 * one - 0.2 * two)
