from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import (
    adapter_state_dict,
    inject_lora,
    load_adapter_state_dict,
)
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.state import audit_state
from tests.models import (
    NormNet,
    TiedHead,
    TiedLinears,
    adapted,
    assert_same,
    mlp,
    snapshot,
)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({}, set()),
        ({"bias": "lora_only"}, {"fc1.bias"}),
        ({"bias": "all"}, {"fc1.bias", "fc2.bias", "head.bias"}),
        ({"modules_to_save": ["head"]}, {"head.weight", "head.bias"}),
    ],
)
def test_the_state_is_what_trains_and_nothing_else(
    settings: dict[str, Any], beside: set[str]
) -> None:
    model = adapted(target_modules=["fc1"], **settings)
    state = adapter_state_dict(model)
    assert set(state) == {"fc1.lora.A", "fc1.lora.B"} | beside
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in state.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == model.get_parameter(name).data_ptr()


@pytest.mark.parametrize("make", [mlp, NormNet, TiedHead, TiedLinears])
def test_what_was_saved_is_loaded(make: Any) -> None:
    settings = {"bias": "all", "train_embeddings": True}
    theirs, model = adapted(make, 1, **settings), adapted(make, 2, **settings)
    state = copied(adapter_state_dict(theirs))
    objects = [id(p) for p in model.parameters()]
    load_adapter_state_dict(model, state)
    assert_same(state, adapter_state_dict(model))
    assert [id(p) for p in model.parameters()] == objects


def test_statistics_of_a_trained_norm_go_with_it() -> None:
    settings = {"target_modules": ["fc"], "modules_to_save": ["head"]}
    theirs, model = adapted(NormNet, 1, **settings), adapted(NormNet, 2, **settings)
    theirs.train()(3 + torch.randn(16, 6))
    state = copied(adapter_state_dict(theirs))
    buffers = {f"head.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert buffers < set(state)
    load_adapter_state_dict(model, state)
    x = torch.randn(3, 6)
    assert torch.equal(model.eval()(x), theirs.eval()(x))
    del state["head.1.running_var"]
    with pytest.raises(CheckpointError, match=r"missing: head\.1\.running_var"):
        load_adapter_state_dict(model, state)


def test_buffers_that_changed_go_with_the_state_and_go_back() -> None:
    model, fresh = adapted(NormNet), adapted(NormNet)
    fresh_state = copied(adapter_state_dict(fresh))
    with torch.no_grad():
        model.norm.running_mean.add_(1)  # type: ignore[union-attr]
    state = copied(adapter_state_dict(model))
    assert set(state) - set(fresh_state) == {"norm.running_mean"}
    load_adapter_state_dict(fresh, state)
    assert bool((fresh.norm.running_mean == 1).all())
    load_adapter_state_dict(fresh, fresh_state)
    assert not fresh.norm.running_mean.any(), "a state without the buffer means its first value"


def test_a_conversion_of_the_model_is_no_change_of_its_buffers() -> None:
    model = NormNet()
    model.norm.running_mean.fill_(0.1234)  # type: ignore[union-attr]
    inject_lora(model, r=2, alpha=6)
    names = list(adapter_state_dict(model))
    model.to(torch.bfloat16)
    assert list(adapter_state_dict(model)) == names


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.pop(name)


def full(state: dict[str, Tensor]) -> None:
    state.clear()
    state.update(mlp().state_dict())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("fc2.lora.B"), ["missing: fc2.lora.B"]),
        (lambda s: s.update({"fc9.lora.A": torch.ones(1)}), ["unexpected: fc9.lora.A"]),
        (
            lambda s: s.update({"fc1.lora.A": torch.ones(3, 6)}),
            ["wrong shape: fc1.lora.A (3, 6) instead of (2, 6)"],
        ),
        (
            lambda s: (s.pop("fc1.bias"), s.update({"x.lora.A": torch.ones(1)})),
            ["missing: fc1.bias", "unexpected: x.lora.A"],
        ),
        (lambda s: s.update({"fc1.weight": torch.ones(10, 6)}), ["unexpected: fc1.weight"]),
        (full, ["holds 6 tensors and no LoRA factors: it is a full-model checkpoint"]),
        (lambda s: s.clear(), ["missing: fc1.bias, fc1.lora.A", "... 4 more"]),
        (
            lambda s: [s.pop(n) for n in list(s) if "lora" in n],
            ["missing: fc1.lora.A"],
        ),
    ],
    ids=["missing", "unexpected", "shape", "several", "base", "full model", "empty", "no factors"],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    spoil: Callable[[dict[str, Tensor]], Any], said: list[str]
) -> None:
    model = adapted(bias="all")
    state = {name: tensor + 1 for name, tensor in adapter_state_dict(model).items()}
    spoil(state)
    before = snapshot(model)
    for function in (load_adapter_state_dict, audit_state):
        with pytest.raises(CheckpointError) as error:
            function(model, state, "run/last.ckpt")
        assert str(error.value).startswith("run/last.ckpt ")
        for words in said:
            assert words in str(error.value)
    assert_same(before, snapshot(model))


def test_a_model_without_lora_has_no_state() -> None:
    with pytest.raises(ConfigError, match="Sequential has no LoRA"):
        adapter_state_dict(mlp())


def test_the_adapter_of_a_roberta_is_small() -> None:
    transformers = pytest.importorskip("transformers")
    # Two of the twelve layers and few words, otherwise the real sizes.
    config = transformers.RobertaConfig(
        vocab_size=50, max_position_embeddings=40, type_vocab_size=1, num_hidden_layers=2
    )
    model = transformers.RobertaForQuestionAnswering(config)
    plan = inject_lora(
        model, r=8, alpha=16, target_modules="qv", bias="all", train_layer_norms=True
    )
    buffer = io.BytesIO()
    torch.save(adapter_state_dict(model), buffer)
    overhead = buffer.getbuffer().nbytes - 4 * plan.trainable_parameters
    # What the format itself takes, for six times the layers, leaves the whole below 1.75 MB.
    assert 4 * 417_794 + 6 * overhead < 1.75e6
