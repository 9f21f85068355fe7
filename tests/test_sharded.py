"""Sharded tensors themselves are tested by the runs of two processes under strategies/."""

from __future__ import annotations

from torch import nn

from lightning_lora.sharded import reshard


class Unit(nn.Module):
    """A wrapper that checkpoints activations, and was made a sharded unit."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = nn.Linear(2, 2)
        self.resharded = 0

    def unshard(self) -> None: ...

    def reshard(self) -> None:
        self.resharded += 1


def test_units_that_are_wrappers_are_resharded_too() -> None:
    model = nn.Sequential(Unit(), nn.ReLU())
    reshard(model)
    assert model[0].resharded == 1
