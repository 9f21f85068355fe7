from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    inject_lora,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.injection import injection_of, require_injection
from lightning_lora.layers import LoRALayer, LoRALinear
from tests.models import (
    AttentionNet,
    TiedHead,
    TiedLinears,
    assert_same,
    hugging_face,
    mlp,
    shake,
    snapshot,
)

SETTINGS: dict[str, Any] = {"r": 2, "alpha": 6}
MODELS = {
    "mlp": (mlp, lambda: torch.randn(4, 6)),
    "attention": (AttentionNet, lambda: torch.randn(2, 5, 8)),
    "tied head": (TiedHead, lambda: torch.arange(8).reshape(2, 4)),
    "tied linears": (TiedLinears, lambda: torch.randn(4, 6)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_module_is_bitwise_itself_after_the_injection(kind: str) -> None:
    make, draw = MODELS[kind]
    torch.manual_seed(0)
    model, x = make().requires_grad_(False), draw()
    expected, objects = model(x), dict(model.named_parameters())
    plan = inject_lora(model, **SETTINGS)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in objects.items())
    assert set(after) - set(objects) == {
        f"{t.name}.lora.{factor}" for t in plan.targets if t.tied_to is None for factor in "AB"
    }
    shake(model)
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("architecture", ["bert", "llama", "albert", "t5", "vit"])
def test_hugging_face_models(architecture: str) -> None:
    model = hugging_face(architecture).eval().requires_grad_(False)
    tokens = torch.arange(12).reshape(2, 6)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 8, 8)}
        if architecture == "vit"
        else {"input_ids": tokens}
    )
    if architecture == "t5":
        inputs["decoder_input_ids"] = tokens
    expected = model(**inputs).logits
    plan = inject_lora(model, **SETTINGS)
    assert torch.equal(model(**inputs).logits, expected)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == len(plan.targets)
    shake(model)
    adapted = model(**inputs).logits
    assert not torch.allclose(adapted, expected, atol=1e-4)
    merge_lora(model)
    torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-4, atol=1e-5)


def test_settings_as_keywords_or_as_a_whole() -> None:
    first, second = mlp(), mlp()
    assert inject_lora(first, **SETTINGS) == inject_lora(second, LoRAConfig(**SETTINGS))
    with pytest.raises(ConfigError, match="not both"):
        inject_lora(mlp(), LoRAConfig(), r=4)
    with pytest.raises(ConfigError, match="did you mean 'alpha'"):
        inject_lora(mlp(), lora_alpha=3)


def test_the_same_settings_again_change_nothing() -> None:
    model = mlp()
    plan = inject_lora(model, **SETTINGS)
    shake(model)
    before = snapshot(model)
    assert inject_lora(model, **SETTINGS) is plan
    assert_same(before, snapshot(model))


def test_other_settings_are_an_error_that_names_them() -> None:
    model = mlp()
    inject_lora(model, **SETTINGS)
    before = snapshot(model)
    with pytest.raises(ConfigError) as error:
        inject_lora(model, r=2, alpha=7, bias="all")
    assert "alpha: 6 -> 7, bias: 'none' -> 'all'" in str(error.value)
    assert "remove_lora" in str(error.value)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_model_inside_another_is_an_error(merged: bool) -> None:
    inner = mlp()
    inject_lora(inner, **SETTINGS)
    if merged:
        merge_lora(inner)
    with pytest.raises(
        ConfigError, match=r"'inner' inside the model was adapted before|'inner\.fc1'"
    ):
        inject_lora(nn.ModuleDict({"inner": inner}), **SETTINGS)


def test_a_part_of_an_adapted_model_is_not_adapted_again() -> None:
    outer = nn.ModuleDict({"inner": mlp()})
    inject_lora(outer, **SETTINGS)
    inner = outer["inner"]
    with pytest.raises(ConfigError, match="'fc1' inside the model was adapted before"):
        inject_lora(inner, **SETTINGS)
    with pytest.raises(ConfigError, match=r"Sequential has no LoRA\. Call inject_lora on this"):
        require_injection(inner)
    assert injection_of(inner) is None


def test_the_seed_is_drawn_from_the_global_generator_unless_given() -> None:
    def factors(seed: int | None, device: str = "cpu") -> Tensor:
        model = mlp()
        with torch.device(device):
            inject_lora(model, LoRAConfig(**SETTINGS), seed=seed)
        A: Tensor = model.fc1.lora.A.detach()
        return A

    assert torch.equal(factors(5), factors(5))
    assert not torch.equal(factors(5), factors(6))
    torch.manual_seed(0)
    first, second = factors(None), factors(None)
    torch.manual_seed(0)
    assert torch.equal(factors(None), first)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(factors(None, "meta"), first), "whatever the default device"


def test_factors_follow_the_device_mode_and_dtype_of_their_layer() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float64)
    )
    model[1].eval()
    inject_lora(model, **SETTINGS)
    assert [m.lora.A.dtype for m in model] == [torch.float32, torch.float64]
    assert [m.lora.training for m in model] == [True, False]
    with torch.device("meta"):
        empty = mlp()
    inject_lora(empty, **SETTINGS)
    assert all(p.is_meta for p in empty.parameters())


def test_tied_layers_share_their_factors() -> None:
    model = TiedLinears()
    inject_lora(model, **SETTINGS)
    assert model.first.lora is model.second.lora
    assert model.first.weight is model.second.weight
    shake(model)
    x = torch.randn(4, 6)
    W = model.first.weight + model.first.delta_weight()
    hidden = torch.tanh(nn.functional.linear(x, W, model.first.bias))
    torch.testing.assert_close(model(x), nn.functional.linear(hidden, W, model.second.bias))
    assert list(adapter_state_dict(model)) == ["first.lora.A", "first.lora.B"]


@pytest.mark.parametrize("kind", ["compiled", "checkpointed", "compiled root"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrappers_around_parts_of_the_model(kind: str, when: str) -> None:
    plain = nn.ModuleDict({"net": mlp()})
    inject_lora(plain, **SETTINGS, bias="all", seed=3)
    shake(plain)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(plain).items()}

    model: Any = nn.ModuleDict({"net": mlp()})

    def wrap() -> Any:
        if kind == "compiled root":
            return torch.compile(model, backend="eager")
        if kind == "compiled":
            model["net"] = torch.compile(model["net"], backend="eager")
        else:
            model["net"].fc1 = checkpoint_wrapper(model["net"].fc1)
        return model

    if when == "before":
        model = wrap()
    inject_lora(model, **SETTINGS, bias="all", seed=4)
    if when == "after":
        model = wrap()
    assert injection_of(model) is not None
    assert list(adapter_state_dict(model)) == list(state)
    load_adapter_state_dict(model, state)
    x = torch.randn(4, 6)
    net = (model._orig_mod if kind == "compiled root" else model)["net"]
    expected = plain["net"](x)
    torch.testing.assert_close(net(x), expected)
    merge_lora(model)
    assert not any(isinstance(m, LoRALayer) for m in model.modules())
    torch.testing.assert_close(net(x), expected)
    unmerge_lora(model)
    torch.testing.assert_close(net(x), expected)
    remove_lora(model)
    assert injection_of(model) is None
    torch.testing.assert_close(net(x), mlp()(x))


def test_nothing_is_changed_by_a_refused_injection() -> None:
    model = mlp()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(TargetError):
        inject_lora(model, target_modules=["fc1", "nothing"])
    assert_same(before, snapshot(model))
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    inject_lora(model, **SETTINGS)


def test_copies_are_independent() -> None:
    model = mlp()
    inject_lora(model, **SETTINGS)
    twin = copy.deepcopy(model)
    remove_lora(twin)
    assert injection_of(model) is not None and injection_of(twin) is None
    assert type(model.fc1) is LoRALinear and type(twin.fc1) is nn.Linear


def test_training_learns_and_leaves_the_base_alone() -> None:
    torch.manual_seed(0)
    model = mlp()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    inject_lora(model, **SETTINGS)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())


def test_what_fabric_has_wrapped_is_refused() -> None:
    from lightning.fabric import Fabric

    net = nn.Sequential(nn.Linear(4, 4))
    wrapped = Fabric(accelerator="cpu", devices=1).setup(net)
    with pytest.raises(ConfigError, match=r"Inject into the module itself, before fabric\.setup"):
        inject_lora(wrapped, r=2)
    inject_lora(net, r=2)
    assert set(adapter_state_dict(net)) == {"0.lora.A", "0.lora.B"}
