"""Merging into a quantized base: an ordinary model, what it costs, and the very base again."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.errors import ConfigError
from lightning_lora.metadata import base_fingerprint
from lightning_lora.quantization import dequantized, quantized_layers
from tests.models import hugging_face, shake
from tests.quantized import KINDS, any_bits, plain_mlp, quantized_hugging_face, quantized_mlp


def adapted(kind: str, **settings: Any) -> nn.Sequential:
    model = quantized_mlp(kind)
    inject_lora(model, **{"r": 2, "alpha": 6, "target_modules": ["fc1"], **settings})
    shake(model)
    return model.eval()


def tokens(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 40, (2, 7), generator=generator)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_merged_model_is_an_ordinary_one_and_computes_the_same(kind: str) -> None:
    model, x = adapted(kind), torch.randn(5, 64)
    unmerged = model.train()(x) if kind == "int8" else model(x)
    base = quantized_mlp(kind)(x)
    report = merge_lora(model)
    # fc2 is not adapted: it is dequantized all the same.
    assert type(model.fc1) is type(model.fc2) is nn.Linear
    assert not quantized_layers(model)
    assert sorted(model.state_dict()) == sorted(plain_mlp().state_dict())
    torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), base, atol=0.1)
    assert set(report.errors) == {"fc1", "fc2"} and max(report.errors.values()) < 1e-6
    assert "dequantized" in str(report) and "fc1" in str(report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["dequantized", "requantized"])
@pytest.mark.parametrize("ran", [True, False])
def test_unmerging_gives_the_very_base_back(kind: str, base: str, ran: bool) -> None:
    model, x = adapted(kind), torch.randn(5, 64)
    with torch.no_grad():
        before = model(x) if ran else None
    objects, classes = dict(model.named_parameters()), [type(m) for m in model]
    packed = {name: any_bits(p) for name, p in objects.items()}
    fingerprint, state = base_fingerprint(model), adapter_state_dict(model)
    for _ in range(2):
        merge_lora(model, base=base)
        assert base_fingerprint(model) == fingerprint
        assert all(torch.equal(v, state[n]) for n, v in adapter_state_dict(model).items())
        with torch.no_grad():
            model(x)
        unmerge_lora(model)
        assert [type(m) for m in model] == classes
        assert list(objects) == [n for n, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert parameter is objects[name]
            assert torch.equal(any_bits(parameter), packed[name])
    with torch.no_grad():
        assert before is None or torch.equal(model(x), before)
    model.train()(x).sum().backward()
    assert model.fc1.lora.A.grad is not None
    merge_lora(model, base=base)
    remove_lora(model)
    assert all("LoRA" not in type(m).__name__ for m in model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_requantizing_says_what_it_costs(kind: str) -> None:
    model, x = adapted(kind), torch.randn(4000, 64)
    W = dequantized(model.fc1, torch.float32) + model.fc1.delta_weight()
    report = merge_lora(model, base="requantized")
    assert list(quantized_layers(model)) == ["fc1", "fc2"]
    packed = dequantized(model.fc1, torch.float32)
    # The reported number is the error of outputs for inputs without a preferred direction.
    measured = (x @ (packed - W).T).norm() / (x @ W.T).norm()
    assert report.errors["fc1"] == pytest.approx(measured.item(), rel=0.05)
    assert 1e-4 < report.errors["fc1"] < (0.02 if kind == "int8" else 0.2)
    assert report.update_errors["fc1"] > report.errors["fc1"]
    model.train()
    torch.testing.assert_close(model.fc1(x), x @ packed.T + model.fc1.bias)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_merged_model_unmerge_exactly(duplicate: Any) -> None:
    model = adapted("nf4")
    packed = any_bits(model.fc1.weight)
    merge_lora(model)
    again = duplicate(model)
    unmerge_lora(again)
    assert torch.equal(any_bits(again.fc1.weight), packed)
    x = torch.randn(3, 64)
    unmerge_lora(model)
    torch.testing.assert_close(again(x), model(x))


def test_conversions_while_merged_leave_the_packed_base_alone() -> None:
    model = adapted("nf4")
    packed = any_bits(model.fc1.weight)
    merge_lora(model)
    model.to(torch.bfloat16)
    assert model.fc1.weight.dtype == torch.bfloat16
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    unmerge_lora(model)
    assert torch.equal(any_bits(model.fc1.weight), packed)


def test_a_bias_that_trains_keeps_its_precision() -> None:
    model = quantized_mlp("nf4", compute_dtype=torch.bfloat16)
    model.head.to(torch.bfloat16)
    for layer in (model.fc1, model.fc2):
        layer.bias = nn.Parameter(layer.bias.data.to(torch.bfloat16))
    model.fc1.bias = nn.Parameter(torch.randn(96) * 1.0001)
    inject_lora(model, r=2, alpha=6, target_modules=["fc1"], bias="lora_only")
    shake(model)
    bias, x = model.fc1.bias, torch.randn(3, 64, dtype=torch.bfloat16)
    model(x)
    assert bias.dtype == torch.float32 and model.fc1.bias is bias
    before = adapter_state_dict(model)
    merge_lora(model)
    assert model.fc1.weight.dtype == model.fc1.bias.dtype == torch.bfloat16
    assert model(x).dtype == torch.bfloat16
    after = adapter_state_dict(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    unmerge_lora(model)
    assert model.fc1.bias is bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_save_pretrained_writes_an_ordinary_folder(
    name: str, kind: str, base: str, tmp_path: Path
) -> None:
    model = quantized_hugging_face(name, kind, tmp_path / "base").eval()
    original = load_file(tmp_path / "base" / "model.safetensors")
    settings = {"r": 2, "alpha": 6}
    inject_lora(model, **settings, seed=1)
    shake(model)
    flags, config = dict(vars(model)), dict(vars(model.config))
    report = merge_lora(model, base=base)
    assert not quantized_layers(model)
    with torch.no_grad():
        expected = model(**tokens(model)).logits
    model.save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in original.items()}
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tokens(model)).logits, expected)
    if base == "original":
        # The same as adapting and merging the model that was never quantized.
        plain = hugging_face(name)
        inject_lora(plain, **settings, seed=1)
        shake(plain)
        merge_lora(plain)
        with torch.no_grad():
            torch.testing.assert_close(plain(**tokens(model)).logits, expected)
        # bf16 rounding alone is far below; this is what quantization had taken away.
        assert 1e-4 < max(report.errors.values()) < 0.3
    unmerge_lora(model)
    assert {k: v for k, v in vars(model).items() if k not in ("_modules", "training")}.keys() == {
        k for k in flags if k not in ("_modules", "training")
    }
    assert model.config.quantization_config is config["quantization_config"]
    assert model.hf_quantizer is flags["hf_quantizer"]
    assert len(quantized_layers(model)) == len(report.errors)


def test_original_weights_that_are_not_to_be_had(tmp_path: Path) -> None:
    raw = adapted("nf4")
    packed = any_bits(raw.fc1.weight)
    with pytest.raises(ConfigError, match="there is no Hugging Face model"):
        merge_lora(raw, base="original")
    model = quantized_hugging_face("bert", "nf4", tmp_path / "base")
    inject_lora(model, r=2, alpha=6)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        merge_lora(model, base="original")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ConfigError, match="dequantized"):
        merge_lora(model, base="original")
    assert len(quantized_layers(model)) == 12 + 1
    assert torch.equal(any_bits(raw.fc1.weight), packed)
    with pytest.raises(ConfigError, match="'dequantized', 'original', 'requantized'"):
        merge_lora(raw, base="requantised")
