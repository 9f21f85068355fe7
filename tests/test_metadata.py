from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError
from lightning_lora.metadata import audit_metadata, base_fingerprint, checkpoint_metadata
from lightning_lora.slices import Slices
from tests.models import TiedHead, TiedLinears, adapted, hugging_face, mlp


def test_metadata_survives_a_safe_load() -> None:
    model = adapted(rank_pattern={"fc2": 3}, modules_to_save=["head"], exclude_modules=["head"])
    checkpoint = {"state_dict": adapter_state_dict(model), "meta": checkpoint_metadata(model)}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["meta"] == checkpoint["meta"]
    assert loaded["meta"]["targets"] == {
        "fc1": {"r": 2, "alpha": 6, "scaling": 3.0, "kind": "Linear"},
        "fc2": {"r": 3, "alpha": 6, "scaling": 2.0, "kind": "Linear"},
    }
    assert loaded["meta"]["base"]["name_or_path"] == "Sequential"
    assert loaded["meta"]["base"]["parameters"] == 185
    audit_metadata(model, loaded["meta"])


def test_metadata_says_which_parts_of_a_fused_projection_are_adapted() -> None:
    model = hugging_face("gpt2")
    inject_lora(model, r=2, target_modules="qv")
    buffer = io.BytesIO()
    torch.save(checkpoint_metadata(model), buffer)
    buffer.seek(0)
    target = torch.load(buffer, weights_only=True)["targets"]["transformer.h.0.attn.c_attn"]
    assert target["kind"] == "Conv1D"
    assert Slices(**target["slices"]) == Slices((("q", 16), ("k", 16), ("v", 16)), ("q", "v"))


def bigger() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model.fc1.weight[0, 0] *= 1.5
    return model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 3}, ["r: 2 in the checkpoint, 3 now"]),
        ({"alpha": 7}, ["alpha: 6 in the checkpoint, 7 now", "scaling: 3.0"]),
        ({"use_rslora": True}, ["scaling: 3.0 in the checkpoint, 4.2"]),
        ({"target_modules": ["fc1"]}, ["adapted in the checkpoint alone: fc2, head"]),
        ({"bias": "all"}, ["bias: 'none' in the checkpoint, 'all' now"]),
        ({"train_layer_norms": True}, ["train_layer_norms: False in the checkpoint, True now"]),
        ({"rank_pattern": {"fc1": 5}}, ["r: 2 in the checkpoint, 5 now"]),
        (
            {"modules_to_save": ["head"], "target_modules": ["fc1", "fc2"]},
            ["checkpoint alone: head"],
        ),
        ({"make": bigger}, ["was trained on another base model", "fingerprint"]),
    ],
)
def test_another_adapter_or_base_is_refused(settings: dict[str, Any], said: list[str]) -> None:
    metadata = checkpoint_metadata(adapted())
    model = adapted(**settings)
    with pytest.raises(CheckpointError) as error:
        audit_metadata(model, metadata, "old.ckpt")
    assert str(error.value).startswith("old.ckpt was trained ")
    for words in said:
        assert words in str(error.value)


def test_another_choice_of_what_trains_whole_is_told_from_another_base() -> None:
    metadata = checkpoint_metadata(adapted(target_modules=["fc1"], modules_to_save=["head"]))
    model = adapted(target_modules=["fc1"], modules_to_save=["fc2"])
    with pytest.raises(CheckpointError, match=r"modules_to_save: \['head'\] in the checkpoint"):
        audit_metadata(model, metadata)


def test_settings_that_do_not_shape_the_state_may_differ() -> None:
    metadata = checkpoint_metadata(adapted())
    audit_metadata(adapted(dropout=0.3, init="gaussian"), metadata)
    audit_metadata(adapted(target_modules=["head", "fc2", "fc1"]), metadata)


def test_a_newer_format_is_refused() -> None:
    model = adapted()
    with pytest.raises(CheckpointError, match="Upgrade lightning-lora"):
        audit_metadata(model, {**checkpoint_metadata(model), "version": 99})


def test_the_fingerprint_is_that_of_the_frozen_base() -> None:
    settings = {"target_modules": ["fc1"], "bias": "all", "modules_to_save": ["head"]}
    expected = base_fingerprint(adapted(**settings))
    trained = adapted(seed=5, **settings)
    with torch.no_grad():
        trained.head.weight.add_(1)
        trained.fc1.bias.add_(1)
    assert base_fingerprint(trained) == expected
    half = mlp().bfloat16()
    inject_lora(half, r=2, alpha=6, **settings)
    assert base_fingerprint(half) == expected
    wrapped = nn.ModuleDict({"model": mlp()})
    inject_lora(wrapped, r=2, alpha=6, **settings)
    assert base_fingerprint(wrapped) == expected
    assert base_fingerprint(adapted(make=bigger, **settings)) != expected


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (mlp, "all-linear"),
        (TiedLinears, "all-linear"),
        (TiedLinears, ["second"]),
        (TiedHead, "all-linear"),
        (TiedHead, ["head"]),
    ],
)
def test_a_merge_does_not_change_the_fingerprint(make: Any, targets: str | list[str]) -> None:
    expected = base_fingerprint(adapted(make, target_modules=targets))
    model = adapted(make, target_modules=targets)
    merge_lora(model)
    assert base_fingerprint(model) == expected
    unmerge_lora(model)
    remove_lora(model)
    inject_lora(model, r=2, alpha=6, target_modules=targets)
    assert base_fingerprint(model) == expected
