from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import adapter_state_dict, inject_lora, remove_lora
from lightning_lora.errors import ConfigError
from lightning_lora.freezing import cast_frozen, check_dtype, freeze
from tests.models import NormNet, mlp, shake


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def statistics(norm: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in norm.buffers()]


def same(before: list[torch.Tensor], norm: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_only_what_the_plan_says_trains() -> None:
    model = NormNet()
    plan = inject_lora(
        model, r=2, alpha=6, target_modules=["fc"], bias="lora_only", modules_to_save=["head.0"]
    )
    expected = {"fc.lora.A", "fc.lora.B", "fc.bias", "head.0.weight", "head.0.bias"}
    assert trained(model) == expected
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable_parameters
    )


def test_freezing_again_repairs_what_others_changed() -> None:
    model = mlp()
    plan = inject_lora(model, r=2, alpha=6, bias="all")
    expected = trained(model)
    model.requires_grad_(False)
    model.fc1.weight.requires_grad_()
    freeze(model, plan)
    assert trained(model) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_statistics_stand_still_and_trained_ones_move(compiled: bool) -> None:
    torch._dynamo.reset()
    model = NormNet()
    inject_lora(model, r=2, alpha=6, target_modules=["fc"], modules_to_save=["head"])
    model.train()
    frozen, moving = model.norm, model.head[1]
    assert isinstance(moving, nn.Module)
    frozen_before, moving_before = statistics(frozen), statistics(moving)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    out = forward(5 + torch.randn(8, 6))
    out.sum().backward()
    assert same(frozen_before, frozen)
    assert not same(moving_before, moving)
    assert frozen.training, "the flag is the user's; only the forward pass is in evaluation"
    names = set(adapter_state_dict(model))
    assert {f"head.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} < names
    assert not any(name.startswith("norm.") for name in names)


def test_a_frozen_norm_computes_as_in_evaluation() -> None:
    model = NormNet()
    with torch.no_grad():
        model.norm.running_mean.add_(1)  # type: ignore[union-attr]
    x = torch.randn(8, 6)
    expected = model.eval().norm(x)
    inject_lora(model, r=2, alpha=6, target_modules=["fc"])
    assert torch.equal(model.train().norm(x), expected)


@pytest.mark.parametrize("ends", ["checkpoint", "exception"])
def test_the_mode_stays_the_users_whatever_ends_the_forward(ends: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    inject_lora(model, r=2, alpha=4)
    if ends == "checkpoint":
        x = torch.randn(6, 4, requires_grad=True)
        checkpoint(model[:2], x, use_reentrant=False).sum().backward()
    else:
        with pytest.raises(ValueError, match="expected 2D"):
            model[1](torch.randn(4))
    assert model[1].training
    remove_lora(model)
    assert not model[1]._forward_hooks_always_called and not model[1]._forward_hooks


def test_removal_lets_the_statistics_move_again() -> None:
    model = NormNet()
    inject_lora(model, r=2, alpha=6, target_modules=["fc"])
    model.train()(torch.randn(8, 6))
    remove_lora(model)
    assert model.norm.training
    assert not model.norm._forward_pre_hooks and not model.norm._forward_hooks
    before = statistics(model.norm)
    model(torch.randn(8, 6))
    assert not same(before, model.norm)


def test_layers_that_were_replaced_are_held_too() -> None:
    model = NormNet()
    plan = inject_lora(
        model, r=2, alpha=6, target_modules=["fc"], modules_to_save=["head"], bias="none"
    )
    expected = trained(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    freeze(converted, plan)
    freeze(converted, plan)
    assert trained(converted) == expected
    assert len(converted.norm._forward_pre_hooks) == 1, "held once, however often it is frozen"
    assert not converted.head[1]._forward_pre_hooks
    before = statistics(converted.norm)
    converted.train()
    converted.norm(5 + torch.randn(8, 6))
    assert same(before, converted.norm)


def test_norms_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False))
    x = torch.randn(8, 6)
    expected = model(x)
    inject_lora(model, r=2, alpha=6)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_casting_the_frozen_matrices(name: str, dtype: torch.dtype) -> None:
    assert check_dtype(name) == dtype
    model = mlp()
    inject_lora(model, r=2, alpha=6, target_modules=["fc1"], modules_to_save=["head"])
    cast_frozen(model, dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, cast in dtypes.items() if cast == dtype} == {"fc1.weight", "fc2.weight"}


def test_dtypes_by_name() -> None:
    assert check_dtype(None) is None
    with pytest.raises(ConfigError, match="'bf16', 'fp16', got 'bfloat16'"):
        check_dtype("bfloat16")


def test_a_cast_base_trains_under_autocast() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6, dropout=0.1)
    shake(model)
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = model.eval()(x)
    cast_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
