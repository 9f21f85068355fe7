from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import inject_lora, merge_lora, remove_lora, unmerge_lora
from lightning_lora.errors import ConfigError
from tests.models import AttentionNet, NormNet, TiedHead, TiedLinears, mlp, shake


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that a removal has to give back, by identity where there is one."""
    return {
        "modules": [(n, id(m), type(m), m.training) for n, m in model.named_modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [
            len(hooks)
            for m in model.modules()
            for hooks in (m._forward_pre_hooks, m._forward_hooks, m._state_dict_hooks)
        ],
        "parameters": [
            (n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "nested": [getattr(m, "use_nested_tensor", None) for m in model.modules()],
        "state": list(model.state_dict()),
    }


@pytest.mark.parametrize("make", [mlp, AttentionNet, NormNet, TiedHead, TiedLinears])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", r".*(fc1|linear1|fc|head|first|head\.0)"])
def test_a_removal_is_exact(make: Any, merged: bool, targets: str) -> None:
    model = make()
    next(model.parameters()).requires_grad_(False)
    before, state = anatomy(model), {n: t.clone() for n, t in model.state_dict().items()}
    inject_lora(model, r=2, alpha=6, target_modules=targets)
    shake(model)
    assert anatomy(model) != before
    if merged:
        merge_lora(model)
        assert any(not torch.equal(model.state_dict()[n], t) for n, t in state.items())
    remove_lora(model)
    assert anatomy(model) == before
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_hooks_of_the_user_stay() -> None:
    model = AttentionNet()
    calls: list[str] = []
    layer = model.encoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("encoder"))
    layer.linear1.register_forward_hook(lambda *_: calls.append("linear"))
    inject_lora(model, r=2, alpha=6)
    remove_lora(model)
    model(torch.randn(1, 3, 8))
    assert calls == ["encoder", "linear"]


def test_what_was_trained_in_place_stays_trained() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6, bias="all")
    with torch.no_grad():
        model.fc1.bias.fill_(3)
    remove_lora(model)
    assert bool((model.fc1.bias == 3).all())


def test_a_model_can_be_adapted_anew() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6)
    remove_lora(model)
    assert inject_lora(model, r=4, alpha=6, target_modules=["fc1"]).lora_parameters == 64


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_that_was_parametrized_since_is_left_alone(merged: bool) -> None:
    model = mlp()
    inject_lora(model, r=2, target_modules=["fc1"])
    shake(model)
    if merged:
        merge_lora(model)
    torch.nn.utils.parametrizations.spectral_norm(model.fc1)
    x = torch.randn(3, 6)
    model.eval()
    before = model(x)
    for undo in (remove_lora, unmerge_lora) if merged else (remove_lora, merge_lora):
        with pytest.raises(ConfigError, match=r"'fc1' was pruned or reparametrized.*permanent"):
            undo(model)
    assert torch.equal(model(x), before)


def test_without_lora_there_is_nothing_to_remove() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6)
    remove_lora(model)
    with pytest.raises(ConfigError, match="Sequential has no LoRA"):
        remove_lora(model)
