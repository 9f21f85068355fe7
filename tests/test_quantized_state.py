"""Checkpoints of a quantized base: its fingerprint, and adapters on another form of the base."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import adapter_state_dict, inject_lora, load_adapter_state_dict
from lightning_lora.errors import CheckpointError
from lightning_lora.fingerprint import Packed, fingerprint
from lightning_lora.metadata import audit_metadata, base_fingerprint, checkpoint_metadata
from tests.models import shake
from tests.quantized import KINDS, plain_mlp, quantized_mlp

SETTINGS: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": ["fc1", "fc2"]}


def adapted(model: nn.Module) -> nn.Module:
    inject_lora(model, **SETTINGS)
    shake(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_counts_packed_values_and_scales(kind: str) -> None:
    known = base_fingerprint(adapted(quantized_mlp(kind)))
    assert base_fingerprint(adapted(quantized_mlp(kind))) == known
    assert base_fingerprint(adapted(quantized_mlp(kind, seed=1))) != known
    model = quantized_mlp(kind)
    model.fc1.weight.data.view(torch.uint8).view(-1)[100] ^= 1
    assert base_fingerprint(adapted(model)) != known
    model = quantized_mlp(kind)
    scale = model.fc1.weight.SCB if kind == "int8" else model.fc1.weight.quant_state.absmax
    scale[3] += 1
    assert base_fingerprint(adapted(model)) != known
    model = adapted(quantized_mlp(kind))
    model(torch.randn(2, 64))  # after which int8 layers keep their scales elsewhere
    assert base_fingerprint(model) == known


def test_the_bytes_of_a_packed_weight_count_and_not_how_they_are_stored() -> None:
    packed = torch.randint(0, 256, (4096, 1), dtype=torch.uint8)
    stored = packed.view(-1).view(torch.float32).view(-1, 1)
    assert fingerprint([Packed(packed)]) == fingerprint([Packed(stored)])
    assert fingerprint([Packed(packed)]) != fingerprint([Packed(packed.flip(0))])


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_say_how_the_base_is_quantized(kind: str) -> None:
    found = checkpoint_metadata(adapted(quantized_mlp(kind)))["base"]["quantization"]
    assert found["kind"] == ("int8" if kind == "int8" else f"{kind} double")
    assert found["layers"] == ["fc1", "fc2"]
    assert checkpoint_metadata(adapted(plain_mlp()))["base"]["quantization"] is None


@pytest.mark.parametrize("to_plain", [True, False])
def test_an_adapter_moves_between_forms_of_its_base(to_plain: bool) -> None:
    models = [adapted(quantized_mlp("nf4")), adapted(plain_mlp())]
    here, there = models if to_plain else models[::-1]
    with pytest.warns(UserWarning, match="in nf4 double" if to_plain else "without quantization"):
        audit_metadata(there, checkpoint_metadata(here), "a.ckpt")
    load_adapter_state_dict(there, adapter_state_dict(here))
    x = torch.randn(9, 64)
    error = (here(x) - there(x)).norm() / here(x).norm()
    assert 0 < error < 0.2


def test_other_kinds_of_quantization() -> None:
    saved = checkpoint_metadata(adapted(quantized_mlp("nf4")))
    with pytest.warns(UserWarning, match=r"is in int8.*what is not quantized in it is the same"):
        audit_metadata(adapted(quantized_mlp("int8")), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit_metadata(adapted(quantized_mlp("nf4")), saved)


@pytest.mark.parametrize("other", [lambda: plain_mlp(1), lambda: quantized_mlp("int8", 1)])
def test_another_base_is_refused_in_any_form(other: Any) -> None:
    saved = checkpoint_metadata(adapted(quantized_mlp("nf4")))
    with pytest.raises(CheckpointError, match=r"another base model(.|\n)*nf4 double"):
        audit_metadata(adapted(other()), saved)
    with pytest.raises(CheckpointError, match="another base model"):
        audit_metadata(adapted(quantized_mlp("nf4", 1)), saved)
