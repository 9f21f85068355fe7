"""Another adapter in the place of the present one, from the exact base or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    active_adapter,
    add_adapter,
    inject_lora,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    swap_adapter,
    unmerge_lora,
)
from lightning_lora.errors import ConfigError, LightningLoRAError
from tests.models import assert_same, shake, snapshot

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
IN_PLACE: dict[str, Any] = {"target_modules": ["0", "3"], "train_layer_norms": True}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def trained(**settings: Any) -> nn.Sequential:
    model = network()
    inject_lora(model, r=2, alpha=6, **settings)
    shake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += 0.3
    return model


def saved(folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter on disk, and what a fresh model with it gives."""
    model = trained(**settings)
    return save_adapter(model, folder), model(X).detach()


@pytest.mark.parametrize("merged", [False, True])
def test_what_was_trained_in_place_gets_the_values_of_the_base(
    tmp_path: Path, merged: bool
) -> None:
    path, expected = saved(tmp_path / "plain", target_modules=["0"])
    model = network()
    base = snapshot(model)
    add_adapter(model, "norms", r=2, alpha=6, **IN_PLACE)
    shake(model)
    with torch.no_grad():
        model[2].weight += 0.5  # type: ignore[operator]
    if merged:
        merge_lora(model)
    swap_adapter(model, path)
    torch.testing.assert_close(model(X), expected)
    set_adapter(model, None)
    assert_same(snapshot(model), base)


@pytest.mark.parametrize("merged", [False, True])
def test_values_that_are_not_known_are_asked_for(tmp_path: Path, merged: bool) -> None:
    path, _ = saved(tmp_path / "plain", target_modules=["0"])
    model = trained(**IN_PLACE)
    if merged:
        merge_lora(model)
    before, out = snapshot(model), model(X)
    with pytest.raises(
        ConfigError, match=r"in place \(2\.weight, 2\.bias\), and their base values"
    ):
        swap_adapter(model, path)
    assert_same(snapshot(model), before)
    assert torch.equal(model(X), out)


def test_values_that_the_new_adapter_brings_need_no_base(tmp_path: Path) -> None:
    model = trained(**IN_PLACE)
    other = network()
    inject_lora(other, r=3, alpha=6, **IN_PLACE)
    shake(other)
    path = save_adapter(other, tmp_path)
    swap_adapter(model, path)
    torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("names", [["9"], ["0", "1.0"]])
def test_a_swap_that_fails_changes_nothing(tmp_path: Path, merged: bool, names: list[str]) -> None:
    other = nn.ModuleDict({name.replace(".", "_"): nn.Linear(6, 4) for name in names})
    inject_lora(other, r=2, alpha=6, target_modules=[name.replace(".", "_") for name in names])
    path = save_adapter(other, tmp_path)
    model = network()
    add_adapter(model, "mine", r=2, alpha=6, **IN_PLACE)
    shake(model)
    unmerged, before = model(X), None
    if merged:
        merge_lora(model)
    before, out = snapshot(model), model(X)
    with pytest.raises(LightningLoRAError):
        swap_adapter(model, path)
    assert active_adapter(model) == "mine"
    assert_same(snapshot(model), before)
    assert torch.equal(model(X), out)
    unmerge_lora(model)
    assert torch.equal(model(X), unmerged)
    remove_lora(model)
