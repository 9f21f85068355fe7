from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import seed_everything
from torch import nn

from lightning_lora import inject_lora
from lightning_lora.layers import LoRAFactors
from tests.models import mlp, shake


def factors(**changes: Any) -> LoRAFactors:
    settings: dict[str, Any] = {
        "name": "layer",
        "A_shape": (4, 100),
        "B_shape": (50, 4),
        "r": 4,
        "alpha": 12,
        "scaling": 3.0,
        "dropout": 0.0,
        "init": "kaiming",
        "seed": 1,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return LoRAFactors(**{**settings, **changes})


def test_kaiming_is_the_distribution_of_peft() -> None:
    A = factors(A_shape=(200, 1000)).A.detach()
    theirs = torch.empty(200, 1000)
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    bound = 1 / math.sqrt(1000)
    for draw in (A, theirs):
        assert 0.999 * bound < draw.abs().max() <= bound
        assert abs(draw.mean()) < 4 * bound / math.sqrt(3 * draw.numel())
        assert abs(draw.std() / (bound / math.sqrt(3)) - 1) < 0.01


@pytest.mark.parametrize("r", [2, 16])
def test_gaussian_has_standard_deviation_one_over_r(r: int) -> None:
    A = factors(A_shape=(r, 100_000), r=r, init="gaussian").A.detach()
    assert abs(A.std() * r - 1) < 0.02
    assert abs(A.mean() * r) < 0.02
    # A normal distribution has about 0.27 % beyond three standard deviations; a uniform one none.
    assert 0.001 < (A.abs() > 3 / r).double().mean() < 0.005


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_second_factor_is_zero(init: str) -> None:
    assert not factors(init=init).B.any()


def test_the_seed_and_the_name_decide_and_nothing_else() -> None:
    first = factors().A
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(factors().A, first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(factors(name="other").A, first)
    assert not torch.equal(factors(seed=2).A, first)
    assert torch.equal(factors(dtype=torch.bfloat16).A, first)


def test_the_default_device_does_not_count() -> None:
    with torch.device("meta"):
        inside = factors()
    assert torch.equal(inside.A, factors().A)


def test_reset_gives_the_first_values_again() -> None:
    lora = factors()
    first = lora.A.detach().clone()
    with torch.no_grad():
        lora.A.add_(1)
        lora.B.add_(1)
    lora.reset_parameters()
    assert torch.equal(lora.A, first)
    assert not lora.B.any()


def test_from_the_meta_device_to_memory() -> None:
    lora = factors(device=torch.device("meta"))
    assert lora.A.is_meta and lora.B.is_meta
    lora.to_empty(device="cpu")
    lora.reset_parameters()
    assert torch.equal(lora.A, factors().A)
    assert not lora.B.any()


def adapted(order: list[str]) -> dict[str, torch.Tensor]:
    model = mlp()
    inject_lora(model, r=2, alpha=6, target_modules=order)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_reproducible_under_a_global_seed() -> None:
    seed_everything(3, verbose=False)
    first = adapted(["fc1", "fc2"])
    second = adapted(["fc1", "fc2"])
    seed_everything(3, verbose=False)
    again = adapted(["fc2", "fc1"])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.lora.A"], second["fc1.lora.A"])


def test_a_layer_draws_the_same_whatever_is_adapted_beside_it() -> None:
    seed_everything(3, verbose=False)
    alone = adapted(["fc2"])
    seed_everything(3, verbose=False)
    assert torch.equal(adapted(["fc1", "fc2", "head"])["fc2.lora.A"], alone["fc2.lora.A"])


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_masters_stay_in_float32(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6)
    shake(model)
    lora = model.fc1.lora
    assert isinstance(lora, LoRAFactors)
    A, values, objects = lora.A.detach(), lora.A.detach().clone(), (lora.A, lora.B)
    cast(model)
    assert model.fc1.weight.dtype in (torch.float16, torch.bfloat16)
    assert lora.A.dtype == lora.B.dtype == torch.float32
    assert torch.equal(lora.A, values) and torch.equal(A, values)
    assert objects == (lora.A, lora.B) or all(
        a is b for a, b in zip((lora.A, lora.B), objects, strict=True)
    )
    assert lora.A.requires_grad


def test_wider_dtypes_are_followed() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6)
    model.double()
    assert model.fc1.lora.A.dtype == torch.float64
    assert factors(dtype=torch.float64).A.dtype == torch.float64
    assert model(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_gradients_keep_the_dtype_of_their_parameter() -> None:
    model = mlp()
    inject_lora(model, r=2, alpha=6)
    model(torch.randn(2, 6)).sum().backward()
    model.bfloat16()
    for parameter in model.fc1.lora.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype == torch.float32


def test_hidden_factors_are_in_no_state_dict() -> None:
    lora = factors()
    assert list(lora.state_dict()) == ["A", "B"]
    lora.hidden = True
    assert list(lora.state_dict()) == []
    lora.load_state_dict({}, strict=True)
    lora.hidden = False
    with pytest.raises(RuntimeError, match="Missing key"):
        lora.load_state_dict({}, strict=True)


def test_it_prints_its_settings() -> None:
    assert "r=4, alpha=12, dropout=0.0" in repr(factors())
