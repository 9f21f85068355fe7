from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_scaled,
    adapter_state_dict,
    add_adapter,
    delete_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    scale_adapter,
    set_adapter,
    swap_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError, ConfigError, TargetError
from lightning_lora.injection import injection_of
from lightning_lora.quantization import quantized_layers
from tests.models import NormNet, assert_same, hugging_face, mlp, shake, snapshot
from tests.modules import PlainClassifier, make_lora, make_trainer
from tests.quantized import any_bits, quantized_mlp

peft = pytest.importorskip("peft")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
FIRST: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["fc1", "fc2"]}
SECOND: dict[str, Any] = {"r": 3, "alpha": 12, "target_modules": ["fc2", "head"], "use_dora": True}


def two(make: Any = mlp) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with two adapters, and what each makes of X, alone on a model of its own."""
    model, expected = make().eval(), {}
    for seed, (name, settings) in enumerate({"first": FIRST, "second": SECOND}.items()):
        add_adapter(model, name, **settings)
        set_adapter(model, name)
        shake(model, seed)
        single = make().eval()
        inject_lora(single, **settings)
        shake(single, seed)
        expected[name] = single(X).detach()
    set_adapter(model, "first")
    return model, expected


def test_each_adapter_does_what_it_does_alone() -> None:
    model, expected = two()
    base = mlp().eval()(X)
    assert adapter_names(model) == ("first", "second") and active_adapter(model) == "first"
    for name in ("first", "second", "first", None, "second"):
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(model(X), base if name is None else expected[name])
    set_adapter(model, "__base__")
    assert torch.equal(model(X), base)
    assert_same(snapshot(mlp()), snapshot(model))
    assert all(type(a) is type(b) for a, b in zip(model.modules(), mlp().modules(), strict=True))


def test_layers_that_an_adapter_leaves_alone_are_plain() -> None:
    model, _ = two()
    assert type(model.head) is nn.Linear and list(adapter_state_dict(model)) == [
        f"{layer}.lora.{leaf}" for layer in ("fc1", "fc2") for leaf in "AB"
    ]
    set_adapter(model, "second")
    assert type(model.fc1) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(
        adapter_state_dict(model)
    )
    set_adapter(model, None)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_later_adapter_waits() -> None:
    model = mlp()
    plan = add_adapter(model, "first", LoRAConfig(**FIRST))
    assert active_adapter(model) == "first" and [t.r for t in plan.targets] == [2, 2]
    assert [t.r for t in add_adapter(model, "second", **SECOND).targets] == [3, 3]
    assert active_adapter(model) == "first"


def test_adapters_are_loaded_and_saved(tmp_path: Path) -> None:
    model, expected = two()
    for name in adapter_names(model):
        set_adapter(model, name)
        save_adapter(model, tmp_path / name)
    again = mlp().eval()
    for name in expected:
        add_adapter(again, name, tmp_path / name)
    for name, out in expected.items():
        set_adapter(again, name)
        assert torch.equal(again(X), out)


@pytest.mark.parametrize("merged_first", [False, True])
def test_a_merged_model_is_merged_again_from_its_exact_base(merged_first: bool) -> None:
    model, expected = two()
    fresh = {}
    for seed, (name, settings) in enumerate({"first": FIRST, "second": SECOND}.items()):
        single = mlp().eval()
        inject_lora(single, **settings)
        shake(single, seed)
        merge_lora(single)
        fresh[name] = dict(single.state_dict())
    if merged_first:
        merge_lora(model)
    for name in ("second", "first", "second"):
        set_adapter(model, name)
        merge_lora(model)
        assert_same(fresh[name], dict(model.state_dict()))
        torch.testing.assert_close(model(X), expected[name], rtol=1e-4, atol=1e-5)
    add_adapter(model, "third", **FIRST)
    assert_same(fresh["second"], dict(model.state_dict()))
    set_adapter(model, None)
    assert_same(snapshot(mlp()), snapshot(model))


def test_a_merge_that_fails_leaves_the_adapter_that_was_active() -> None:
    model, _ = two()
    add_adapter(model, "third", **FIRST)
    set_adapter(model, "third")
    with torch.no_grad():
        model.fc1.lora.B.fill_(torch.nan)
    set_adapter(model, "first")
    merge_lora(model)
    before, out = snapshot(model), model(X)
    with pytest.raises(ConfigError, match=r"Not merged: fc1\.lora\.B holds NaN"):
        set_adapter(model, "third")
    assert active_adapter(model) == "first" and injection_of(model).merged  # type: ignore
    assert torch.equal(model(X), out)
    assert_same(before, snapshot(model))
    set_adapter(model, "second")


def test_modules_to_save_that_are_none_are_said_in_three_ways(tmp_path: Path) -> None:
    save_adapter(two()[0], tmp_path / "first")
    for modules_to_save in (None, "auto", []):
        model = mlp()
        inject_lora(model, modules_to_save=modules_to_save, **FIRST)
        factor = model.fc1.lora.A
        load_adapter(model, tmp_path / "first")
        swap_adapter(model, tmp_path / "first")
        assert model.fc1.lora.A is factor
    with pytest.raises(ConfigError, match="adapted before with other settings"):
        inject_lora(model, modules_to_save=["head"], **FIRST)


def test_what_trains_in_place_goes_with_its_adapter() -> None:
    torch.manual_seed(0)
    model = NormNet()
    base = snapshot(model)
    settings: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["fc"], "bias": "all"}
    states = {}
    for seed, name in enumerate(("first", "second")):
        add_adapter(model, name, modules_to_save=["head"], **settings)
        set_adapter(model, name)
        shake(model, seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randn(8, 6))
        states[name] = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    assert "head.1.running_mean" in states["first"]
    for name in ("first", "second"):
        set_adapter(model, name)
        assert_same(states[name], adapter_state_dict(model))
    set_adapter(model, None)
    assert_same(base, snapshot(model))


def test_an_adapter_that_was_injected_before() -> None:
    model = mlp().eval()
    inject_lora(model, **FIRST)
    shake(model)
    expected = model(X)
    assert adapter_names(model) == ("default",) and active_adapter(model) == "default"
    add_adapter(model, "second", **SECOND)
    set_adapter(model, "second")
    set_adapter(model, "default")
    assert torch.equal(model(X), expected)
    trained = mlp()
    inject_lora(trained, bias="all", **FIRST)
    before = snapshot(trained)
    with pytest.raises(ConfigError, match=r"trains base parameters in place \(fc1.bias"):
        add_adapter(trained, "second", **SECOND)
    assert_same(before, snapshot(trained))


def test_deleting_and_removing() -> None:
    model, expected = two()
    delete_adapter(model, "first")
    assert adapter_names(model) == ("second",) and active_adapter(model) is None
    assert injection_of(model) is None
    set_adapter(model, "second")
    assert torch.equal(model(X), expected["second"])
    remove_lora(model)
    assert adapter_names(model) == ()
    add_adapter(model, "second", **SECOND)
    add_adapter(model, "third", **FIRST)
    delete_adapter(model, "third")
    delete_adapter(model, "second")
    assert_same(snapshot(mlp()), snapshot(model))
    assert not any("lightning_lora" in key for key in model.__dict__)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_have_the_same_adapters(duplicate: Any) -> None:
    model, expected = two()
    twin = duplicate(model)
    set_adapter(model, None)
    for name in ("second", "first"):
        set_adapter(twin, name)
        assert torch.equal(twin(X), expected[name])


def test_optimizers_keep_their_adapter() -> None:
    model, _ = two()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    set_adapter(model, "second")
    set_adapter(model, "first")
    before = model(X)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(X), before)


def test_quantized_layers() -> None:
    torch.manual_seed(0)
    model, x = quantized_mlp("nf4").eval(), torch.randn(3, 64)
    base, expected = copy.deepcopy(model).train()(x), {}
    for seed, name in enumerate(("first", "second")):
        add_adapter(model, name, r=2, alpha=6, target_modules=["fc1", "fc2"])
        set_adapter(model, name)
        shake(model, seed)
        expected[name] = model(x)
    merge_lora(model)
    set_adapter(model, "first")
    torch.testing.assert_close(model(x), expected["first"], rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(x), expected["first"])
    set_adapter(model, None)
    assert torch.equal(model(x), base)
    for name in expected:
        delete_adapter(model, name)
    fresh = quantized_mlp("nf4")
    flags = [getattr(m.fc1, "support_avx512bf16_for_cpu", None) for m in (model, fresh)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_added_adapter_of_peft_starts_from_the_base(tmp_path: Path, init: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"], init_lora_weights=init)
    theirs = peft.get_peft_model(mlp(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 if parameter.requires_grad else 0)
    theirs.save_pretrained(tmp_path)
    model = mlp()
    add_adapter(model, "first", **FIRST)
    add_adapter(model, "theirs", tmp_path)
    set_adapter(model, "theirs")
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(X), mlp()(X), atol=1e-2)


def test_an_exchange_repeats_what_a_quantized_base_was_merged_into() -> None:
    model = quantized_mlp("nf4")
    for seed, name in enumerate(("first", "second")):
        add_adapter(model, name, r=2, alpha=6, target_modules=["fc1", "fc2"])
        set_adapter(model, name)
        shake(model, seed)
    merge_lora(model, "requantized")
    packed = any_bits(model.fc1.weight)
    set_adapter(model, "first")
    assert list(quantized_layers(model)) == ["fc1", "fc2"]
    set_adapter(model, "second")
    add_adapter(model, "third", r=2, alpha=6, target_modules=["fc1"])
    scale_adapter(model, 0.5)
    assert list(quantized_layers(model)) == ["fc1", "fc2"]
    assert not torch.equal(any_bits(model.fc1.weight), packed)
    scale_adapter(model, 1)
    assert torch.equal(any_bits(model.fc1.weight), packed)


def test_mistakes(tmp_path: Path) -> None:
    model, expected = two()
    with pytest.raises(ConfigError, match=r"'first' is taken \(the model has 'first', 'second'\)"):
        add_adapter(model, "first", **FIRST)
    with pytest.raises(ConfigError, match="'__base__' cannot be used"):
        add_adapter(model, "__base__", **FIRST)
    with pytest.raises(ConfigError, match="either a source or keyword settings"):
        add_adapter(model, "third", tmp_path, r=4)
    with pytest.raises(ConfigError, match=r"no adapter 'third' \(the model has 'first', 'second'"):
        set_adapter(model, "third")
    with pytest.raises(ConfigError, match=r"no adapter 'x' \(the model has none\)"):
        delete_adapter(mlp(), "x")
    with pytest.raises(TargetError, match="matched nothing"):
        add_adapter(model, "third", target_modules=["nothing"])
    with pytest.raises(CheckpointError, match="no adapter folder"):
        add_adapter(model, "third", tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    inject_lora(other, r=2, alpha=6)
    saved = save_adapter(other, tmp_path / "other")
    (saved / "adapter_config.json").write_text(
        (saved / "adapter_config.json").read_text().replace('"0"', '"fc1"')
    )
    with pytest.raises((CheckpointError, TargetError)):
        add_adapter(model, "third", saved)
    assert adapter_names(model) == ("first", "second") and active_adapter(model) == "first"
    assert torch.equal(model(X), expected["first"])


def test_scaling_an_adapter() -> None:
    model, _ = two()
    base, whole = mlp().eval()(X), model(X).detach()
    delta = model.fc1.delta_weight().detach().clone()
    scale_adapter(model, 0.25)
    torch.testing.assert_close(model.fc1.delta_weight(), 0.25 * delta)
    set_adapter(model, "second")
    set_adapter(model, "first")
    with adapter_scaled(model, 2):
        torch.testing.assert_close(model.fc1.delta_weight(), 0.5 * delta)
    torch.testing.assert_close(model.fc1.delta_weight(), 0.25 * delta)
    scale_adapter(model, 0)
    assert torch.equal(model(X), base)
    scale_adapter(model, 1)
    assert torch.equal(model(X), whole)
    merge_lora(model)
    merged = model(X)
    scale_adapter(model, 0.5)
    assert not torch.allclose(model(X), merged, atol=1e-3)
    scale_adapter(model, 1)
    assert torch.equal(model(X), merged)
    with pytest.raises(ConfigError, match="finite number, got nan"):
        scale_adapter(model, float("nan"))
    with pytest.raises(ConfigError, match="finite number, got inf"), adapter_scaled(model, 1e999):
        pass
    with pytest.raises(ConfigError, match="has no LoRA"):
        scale_adapter(mlp(), 1)


@pytest.mark.parametrize("merged", [False, True])
def test_a_scaled_adapter_gets_its_scaling_back_whatever_is_active_then(merged: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        add_adapter(model, name, r=2, alpha=6, target_modules=["0"])
        set_adapter(model, name)
        shake(model)
    x, outs = torch.randn(3, 4), {}
    for name in ("a", "b"):
        set_adapter(model, name)
        outs[name] = model(x).detach()
    set_adapter(model, "a")
    if merged:
        merge_lora(model)
    with adapter_scaled(model, 2.0):
        set_adapter(model, "b")
        torch.testing.assert_close(model(x), outs["b"])
    for name in ("b", "a"):
        set_adapter(model, name)
        torch.testing.assert_close(model(x), outs[name])


def test_scaling_an_adapter_without_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model, r=0, bias="all")
    with adapter_scaled(model, 2.0):
        pass
    scale_adapter(model, 0.5)


def test_a_scaled_adapter_is_peft_s(tmp_path: Path) -> None:
    from peft.helpers import rescale_adapter_scale

    ids = torch.arange(8)[None]
    model = hugging_face("llama")
    inject_lora(model, r=4, alpha=10, target_modules=["q_proj", "down_proj"])
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hugging_face("llama"), tmp_path / "adapter")
    with adapter_scaled(model, 0.4), rescale_adapter_scale(theirs, 0.4):
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


def test_the_callback_trains_the_active_adapter(tmp_path: Path) -> None:
    module = PlainClassifier()
    settings: dict[str, Any] = {"r": 4, "alpha": 12}
    add_adapter(module, "first", **settings)
    add_adapter(module, "second", r=2, alpha=12)
    before = {name: value.clone() for name, value in adapter_state_dict(module).items()}
    make_trainer(tmp_path, make_lora(**settings), max_epochs=1).fit(module)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(before)
    assert not torch.equal(saved["state_dict"]["net.0.lora.B"], before["net.0.lora.B"])
    unmerge_lora(module)
    assert_same(saved["state_dict"], adapter_state_dict(module))
    set_adapter(module, "second")
    assert all(not p.any() for n, p in module.named_parameters() if n.endswith("lora.B"))
    with pytest.raises(ConfigError, match="adapted before with other settings"):
        make_trainer(tmp_path, make_lora(**settings), max_epochs=1).fit(module)
    again = PlainClassifier()
    add_adapter(again, "trained", tmp_path / "last.ckpt")
    assert_same(saved["state_dict"], adapter_state_dict(again))
    load_adapter(again, tmp_path / "last.ckpt")


def test_a_sharded_model_keeps_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = two()
    monkeypatch.setattr("lightning_lora.adapter_set.is_sharded", lambda parameter: True)
    for change in (lambda: set_adapter(model, "second"), lambda: add_adapter(model, "x", **FIRST)):
        with pytest.raises(ConfigError, match="is sharded, and a sharded model keeps the adapter"):
            change()
    assert torch.equal(model(X), expected["first"])


def test_swapping_replaces_the_active_adapter(tmp_path: Path) -> None:
    model, expected = two()
    set_adapter(model, "second")
    saved = save_adapter(model, tmp_path / "second")
    set_adapter(model, "first")
    swap_adapter(model, saved)
    assert adapter_names(model) == ("second", "default") and active_adapter(model) == "default"
    assert torch.equal(model(X), expected["second"])
    set_adapter(model, None)
    assert_same(snapshot(mlp()), snapshot(model))
