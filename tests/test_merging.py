from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRALayer, LoRALinear
from tests.models import (
    AttentionNet,
    NormNet,
    TiedHead,
    TiedLinears,
    assert_same,
    mlp,
    shake,
    snapshot,
)

INPUTS: dict[Any, Callable[[], Tensor]] = {
    mlp: lambda: torch.randn(4, 6),
    AttentionNet: lambda: torch.randn(2, 5, 8),
    NormNet: lambda: torch.randn(4, 6),
    TiedHead: lambda: torch.arange(8).reshape(2, 4),
    TiedLinears: lambda: torch.randn(4, 6),
}


def adapted(make: Any = mlp, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().to(dtype).eval()
    inject_lora(model, **{"r": 2, "alpha": 6, **settings})
    shake(model)
    return model


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_is_unmerged_and_not_the_base(make: Any, use_rslora: bool) -> None:
    torch.manual_seed(0)
    base, x = make().eval(), INPUTS[make]()
    model = adapted(make, use_rslora=use_rslora)
    with torch.no_grad():
        before = model(x)
        merge_lora(model)
        merged = model(x)
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(merged, base(x), atol=1e-2)


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_bitwise_exact(make: Any, dtype: torch.dtype) -> None:
    model = adapted(make, dtype)
    parameters = list(model.named_parameters(remove_duplicate=False))
    before, keys, requires = snapshot(model), list(model.state_dict()), trains(model)
    for _ in range(3):
        merge_lora(model)
        unmerge_lora(model)
    assert_same(before, snapshot(model))
    assert list(model.state_dict()) == keys
    assert trains(model) == requires
    after = list(model.named_parameters(remove_duplicate=False))
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(parameters, after, strict=True))


def trains(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_merging_twice_and_unmerging_twice_change_nothing_more() -> None:
    model = adapted()
    unmerge_lora(model)
    base = snapshot(model)
    merge_lora(model)
    merged = snapshot(model)
    merge_lora(model)
    assert_same(merged, snapshot(model))
    unmerge_lora(model)
    unmerge_lora(model)
    assert_same(base, snapshot(model))


@pytest.mark.parametrize("make", INPUTS)
def test_a_merged_model_is_a_plain_one(make: Any) -> None:
    model = adapted(make)
    merge_lora(model)
    plain = make()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    plain.load_state_dict(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    assert all(classes[name] is type(module) for name, module in plain.named_modules())
    if make is not TiedHead:
        x = INPUTS[make]()
        torch.testing.assert_close(plain.eval()(x), model(x))


def test_the_weight_of_a_merged_layer() -> None:
    model = adapted(dtype=torch.bfloat16)
    layer = model.fc1
    assert isinstance(layer, LoRALinear)
    A, B = layer.lora.A.detach().clone(), layer.lora.B.detach().clone()
    expected = (layer.weight.float() + 3.0 * B @ A).bfloat16()
    merge_lora(model)
    torch.testing.assert_close(layer.weight, expected, rtol=0.01, atol=1e-3, check_stride=False)
    assert type(layer) is nn.Linear


def test_the_adapter_is_the_same_while_merged() -> None:
    model = adapted(bias="all")
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    merge_lora(model)
    assert_same(before, adapter_state_dict(model))
    with pytest.raises(ConfigError, match=r"The model is merged\. Call unmerge_lora"):
        load_adapter_state_dict(model, before)


@pytest.mark.parametrize("make", [mlp, TiedHead, TiedLinears])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_a_merged_model_unmerge_exactly(make: Any, duplicate: Any) -> None:
    model = adapted(make)
    base = snapshot(model)
    merge_lora(model)
    merged = snapshot(model)
    twin = duplicate(model)
    unmerge_lora(twin)
    assert_same(base, snapshot(twin))
    assert_same(merged, snapshot(model))
    if make is TiedHead:
        assert twin.head.weight is twin.embedding.weight
    merge_lora(twin)
    assert_same(merged, snapshot(twin))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_diverged_adapter_is_not_merged(value: float, factor: str) -> None:
    model = adapted()
    with torch.no_grad():
        getattr(model.fc2.lora, factor)[0, 0] = value
    before = {name: tensor.nan_to_num(7) for name, tensor in snapshot(model).items()}
    with pytest.raises(ConfigError, match=rf"Not merged: fc2.lora.{factor} holds NaN"):
        merge_lora(model)
    assert_same(before, {name: tensor.nan_to_num(7) for name, tensor in snapshot(model).items()})
    assert isinstance(model.fc1, LoRALinear)


@pytest.mark.parametrize("make", [mlp, TiedHead, TiedLinears])
def test_conversions_while_merged(make: Any) -> None:
    model = adapted(make)
    expected = {
        name: tensor if ".lora." in name else tensor.bfloat16()
        for name, tensor in snapshot(model).items()
    }
    merge_lora(model)
    model.to(torch.bfloat16)
    unmerge_lora(model)
    assert_same(expected, snapshot(model))


def test_a_tied_head_is_untied_for_the_merge_alone() -> None:
    model = adapted(TiedHead, target_modules=["head"])
    weight, values = model.embedding.weight, model.embedding.weight.detach().clone()
    x = INPUTS[TiedHead]()
    before = model(x)
    merge_lora(model)
    assert model.embedding.weight is weight and torch.equal(weight, values)
    assert model.head.weight is not weight
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert model.head.weight is model.embedding.weight is weight
    assert torch.equal(weight, values)
    assert torch.equal(model(x), before)


def test_tied_layers_stay_tied() -> None:
    model = adapted(TiedLinears)
    weight = model.first.weight
    expected = (weight + model.first.delta_weight()).detach()
    merge_lora(model)
    assert model.first.weight is model.second.weight is weight
    torch.testing.assert_close(weight.detach(), expected)
    unmerge_lora(model)
    assert model.first.weight is model.second.weight is weight


def test_one_of_two_tied_layers() -> None:
    model = adapted(TiedLinears, target_modules=["second"])
    weight, x = model.first.weight, INPUTS[TiedLinears]()
    before = model(x)
    merge_lora(model)
    assert model.first.weight is weight and model.second.weight is not weight
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert model.second.weight is weight


def test_a_weight_that_trains_whole_elsewhere() -> None:
    model = adapted(TiedHead, target_modules=["head"], train_embeddings=True)
    x = INPUTS[TiedHead]()
    model(x).sum().backward()
    assert model.embedding.weight.grad is not None and model.head.lora.A.grad is not None
    before = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(model(x), before)


def test_training_goes_on_after_unmerging() -> None:
    model = adapted()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    merge_lora(model)
    unmerge_lora(model)
    before = model.fc1.lora.B.detach().clone()
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc1.lora.B, before)


def test_without_lora() -> None:
    model = adapted()
    remove_lora(model)
    for function in (merge_lora, unmerge_lora):
        with pytest.raises(ConfigError, match="has no LoRA"):
            function(model)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "pruned"],
)
def test_a_weight_that_was_reparametrized_since_is_refused(change: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject_lora(model, r=2, alpha=6)
    shake(model)
    change(model[1])
    x = torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(ConfigError, match="'1' was pruned or reparametrized after LoRA"):
        merge_lora(model)
    assert torch.equal(model(x), expected)
