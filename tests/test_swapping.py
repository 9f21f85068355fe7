"""Another adapter in the place of the present one, from the exact base or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_lora.interop
from lightning_lora import (
    active_adapter,
    adapter_names,
    adapter_state_dict,
    add_adapter,
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
from lightning_lora.injection import require_injection
from lightning_lora.quantization import keep_trainable, quantized_layers
from tests.models import assert_same, hugging_face, shake, snapshot
from tests.quantized import any_bits, quantized_hugging_face

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(2, 22).reshape(2, 10)
PLAIN: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["fc"], "modules_to_save": []}
IN_PLACE: dict[str, dict[str, Any]] = {
    "biases": {"r": 3, "alpha": 6, "target_modules": ["fc"], "bias": "all"},
    "norms": {"r": 2, "alpha": 6, "target_modules": ["fc"], "train_layer_norms": True},
    "head": {"r": 2, "alpha": 6, "target_modules": ["fc"], "modules_to_save": ["head"]},
    "no factors": {"r": 0, "bias": "all"},
}


class Net(nn.Module):
    """What trains in place here: biases, a norm, and a head with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.fc(x))))
        return out


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if isinstance(model, Net):
            model.train()(X)
    model.eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(X) if isinstance(model, Net) else model(input_ids=IDS)
    return out if isinstance(out, Tensor) else out.logits


def checkpoint(model: nn.Module, path: Path) -> Path:
    """An adapter on disk; PEFT's format has no place for rank 0 and for running statistics."""
    from lightning_lora.metadata import METADATA_KEY, checkpoint_metadata

    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    saved = {"state_dict": state, METADATA_KEY: checkpoint_metadata(model)}
    torch.save({"pytorch-lightning_version": "2.0", **saved}, path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An adapter of factors alone."""
    model = net()
    inject_lora(model, **PLAIN)
    train(model, 5)
    return checkpoint(model, tmp_path / "plain.ckpt")


def fresh(path: Path, merged: bool) -> nn.Module:
    model = net()
    load_adapter(model, path)
    if merged:
        merge_lora(model)
    return model


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_the_old_adapter_trains_in_place_goes_with_it(
    kind: str, merged: bool, plain: Path
) -> None:
    model = net()
    base = snapshot(model)
    add_adapter(model, "old", **IN_PLACE[kind])
    train(model, 1)
    old = checkpoint(model, plain.with_name("old.ckpt"))
    before = run(model)
    if merged:
        merge_lora(model)
        before = run(model)
    swap_adapter(model, plain)
    expected = fresh(plain, merged)
    assert_same(snapshot(expected), snapshot(model))
    assert torch.equal(run(model), run(expected)) and not torch.allclose(run(model), before)
    # The base values of what comes in are known too.
    swap_adapter(model, old)
    assert torch.equal(run(model), before)
    swap_adapter(model, plain)
    assert torch.equal(run(model), run(expected))
    set_adapter(model, None)
    assert_same(base, snapshot(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_base_values_that_are_not_known(kind: str, merged: bool, plain: Path) -> None:
    model = net()
    inject_lora(model, **IN_PLACE[kind])
    train(model, 1)
    if merged:
        merge_lora(model)
    before, record = snapshot(model), require_injection(model)
    with pytest.raises(ConfigError, match="base values are not known any more"):
        swap_adapter(model, plain)
    assert_same(before, snapshot(model))
    assert require_injection(model) is record and record.merged is merged


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_is_left_of_a_head_that_both_adapters_bring(merged: bool, tmp_path: Path) -> None:
    expected, base = {}, hugging_face("bert")
    # The settings of adapters from PEFT's folders differ from those that they were injected with.
    for seed, (name, r) in enumerate({"first": 2, "second": 4}.items()):
        model = hugging_face("bert")
        inject_lora(model, r=r, alpha=6)
        train(model, seed)
        save_adapter(model, tmp_path / name)
        expected[name] = hugging_face("bert")
        load_adapter(expected[name], tmp_path / name)
        if merged:
            merge_lora(expected[name])
    model = hugging_face("bert")
    inject_lora(model, r=2, alpha=6)
    train(model, 7)
    if merged:
        merge_lora(model)
    for name in ("second", "first", "second"):
        swap_adapter(model, tmp_path / name)
        assert torch.equal(run(model), run(expected[name]))
        assert_same(snapshot(expected[name]), snapshot(model))
    other = hugging_face("bert")
    inject_lora(other, r=2, alpha=6, modules_to_save=[])
    save_adapter(other, tmp_path / "no head")
    with pytest.raises(ConfigError, match=r"in place \(classifier.weight, classifier.bias\)"):
        swap_adapter(model, tmp_path / "no head")
    assert torch.equal(run(model), run(expected["second"]))
    remove_lora(model)
    assert torch.equal(model.bert.pooler.dense.weight, base.bert.pooler.dense.weight)


def spoil(folder: Path) -> Path:
    """Let the factors in a folder be what a fit that diverged leaves."""
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    return folder


def refusals(folder: Path) -> dict[str, tuple[Path, type[Exception], str]]:
    """Adapters on disk that do not go into `Net`, or not into it merged."""
    found = {}

    def refused(name: str, other: nn.Module, error: type[Exception], match: str, **s: Any) -> None:
        inject_lora(other, alpha=6, modules_to_save=[], **s)
        found[name] = (save_adapter(other, folder / name), error, match)

    layers = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    refused("other layers", layers, TargetError, "cannot be adapted", r=2, target_modules=["0.1"])
    for r in (2, 3):
        wide = net()
        wide.fc = nn.Linear(9, 6)
        why = "nothing was loaded"
        refused(f"shapes {r}", wide, CheckpointError, why, r=r, target_modules=["fc"])
    for r in (2, 3):
        diverged = net()
        refused(f"diverged {r}", diverged, ConfigError, "Not merged", r=r, target_modules=["fc"])
        spoil(folder / f"diverged {r}")
    found["no folder"] = (folder / "nothing.ckpt", CheckpointError, "not found")
    return found


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_failed_swap_leaves_the_model_as_it_was(
    added: bool, merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    # As PEFT's folder says them, so that an adapter of rank 2 has the same settings.
    settings = {"r": 2, "alpha": 6, "target_modules": ["fc"], "modules_to_save": []}
    if added:
        add_adapter(model, "mine", bias="all", **settings)
        add_adapter(model, "other", **IN_PLACE["norms"])
    else:
        inject_lora(model, **settings)
    train(model, 1)
    scale_adapter(model, 0.75)
    if merged:
        merge_lora(model)
    record = require_injection(model)
    before, expected, names = snapshot(model), run(model), adapter_names(model)
    objects, kinds = list(model.parameters()), [type(module) for module in model.modules()]

    def assert_as_it_was() -> None:
        assert_same(before, snapshot(model))
        assert torch.equal(run(model), expected)
        assert require_injection(model) is record and record.merged is merged
        assert adapter_names(model) == names
        assert active_adapter(model) == ("mine" if added else "default")
        assert [type(module) for module in model.modules()] == kinds
        assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))

    for name, (path, error, match) in refusals(tmp_path).items():
        if not merged and "diverged" in name:
            continue
        with pytest.raises(error, match=match):
            swap_adapter(model, path)
        assert_as_it_was()

    load = lightning_lora.interop.load_adapter_state_dict

    def interrupted(*arguments: Any) -> None:
        load(*arguments)
        raise KeyboardInterrupt

    for r in (2, 3):
        other = net()
        inject_lora(other, **{**settings, "r": r})
        path = save_adapter(other, tmp_path / f"fits {r}")
        with monkeypatch.context() as patch:
            patch.setattr("lightning_lora.interop.load_adapter_state_dict", interrupted)
            with pytest.raises(KeyboardInterrupt):
                swap_adapter(model, path)
        assert_as_it_was()


@pytest.mark.parametrize("merged", [False, True])
def test_a_base_that_loftq_quantized_anew(merged: bool, tmp_path: Path) -> None:
    def make() -> Any:
        model = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
        keep_trainable(model)
        return model

    def bits(model: nn.Module) -> dict[str, Tensor]:
        return {name: any_bits(parameter) for name, parameter in model.named_parameters()}

    other = make()
    base = bits(other)
    inject_lora(other, r=3, alpha=6, modules_to_save=[])
    shake(other)
    good = save_adapter(other, tmp_path / "good")
    expected = run(other)
    bad = spoil(save_adapter(other, tmp_path / "bad"))
    model = make()
    inject_lora(model, r=2, alpha=6, init="loftq", loftq_iter=2, modules_to_save=[])
    shake(model)
    before = bits(model)
    assert any(not torch.equal(base[name], before[name]) for name in base if name in before)
    merge_lora(model)
    merged_before = run(model)
    with pytest.raises(ConfigError, match="Not merged"):
        swap_adapter(model, bad)
    assert torch.equal(run(model), merged_before)
    unmerge_lora(model)
    after = bits(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    if merged:
        merge_lora(model)
    swap_adapter(model, good)
    torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-3)
    remove_lora(model)
    after = bits(model)
    assert list(after) == list(base) and len(quantized_layers(model)) > 2
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_the_other_adapters_stay(plain: Path) -> None:
    model = net()
    add_adapter(model, "first", **IN_PLACE["biases"])
    add_adapter(model, "second", **IN_PLACE["norms"])
    set_adapter(model, "second")
    train(model, 1)
    second = run(model)
    set_adapter(model, "first")
    swap_adapter(model, plain)
    assert adapter_names(model) == ("second", "default") and active_adapter(model) == "default"
    assert torch.equal(run(model), run(fresh(plain, merged=False)))
    set_adapter(model, "second")
    assert torch.equal(run(model), second)
    set_adapter(model, None)
    assert_same(snapshot(net()), snapshot(model))


def test_adapters_with_the_same_settings_take_the_same_factors(plain: Path) -> None:
    model = net()
    add_adapter(model, "first", **PLAIN)
    train(model, 1)
    factors = list(model.fc.lora.parameters())
    scale_adapter(model, 0.5)
    swap_adapter(model, plain)
    assert all(a is b for a, b in zip(factors, model.fc.lora.parameters(), strict=True))
    assert adapter_names(model) == ("first",)
    # The factor of scale_adapter was for the adapter before.
    assert torch.equal(run(model), run(fresh(plain, merged=False)))
