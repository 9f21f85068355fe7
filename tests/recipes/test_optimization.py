"""Parameter groups, LoRA+ and the schedules."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lora import inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.recipes.optimization import (
    build_optimizer,
    parameter_groups,
    warmup_schedule,
    warmup_steps,
)


def _model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    return model


def _sgd(rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_only_matrices_decay_and_only_trained_parameters_are_grouped() -> None:
    model = _model()
    assert [group.get("weight_decay") for group in parameter_groups(model)] == [0.0]
    model[0].weight.requires_grad_(True)
    decayed, plain = parameter_groups(model)
    assert decayed["params"] == [model[0].weight]
    assert len(plain["params"]) == 3


def test_a_given_optimizer_keeps_its_own_values() -> None:
    model = torch.nn.Linear(2, 2)
    adamw = build_optimizer(model, None, learning_rate=0.1, weight_decay=0.2)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.1, 0.2), (0.1, 0.0)]
    sgd = build_optimizer(model, lambda groups: torch.optim.SGD(groups, lr=0.3), 0.1, 0.2)
    assert [(g["lr"], g["weight_decay"]) for g in sgd.param_groups] == [(0.3, 0), (0.3, 0)]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No parameter is trained"):
        build_optimizer(torch.nn.Linear(2, 2).requires_grad_(False), None, 0.1, 0.0)


@pytest.mark.parametrize("given", [False, True])
def test_lora_plus_raises_the_rate_of_b_alone(given: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    inject_lora(model, r=2, alpha=4, bias="all")
    sgd = (lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)) if given else None
    optimizer = build_optimizer(model, sgd, 0.1, 0.3, lora_plus_ratio=16)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert "lr_ratio" not in optimizer.param_groups[-1]
    for layer in model:
        assert found[id(layer.lora.B)] == (pytest.approx(1.6), 0.3)
        assert found[id(layer.lora.A)] == (0.1, 0.3)
        assert found[id(layer.bias)] == (0.1, 0.0)
    schedule = warmup_schedule(optimizer, 2, 4)["scheduler"]
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.05, 0.8])


def test_lora_plus_without_factors_is_refused() -> None:
    with pytest.raises(ConfigError, match="no LoRA factors"):
        build_optimizer(torch.nn.Linear(2, 2), None, 0.1, 0.0, lora_plus_ratio=16)


def _rates(total: int, steps: int, **settings: object) -> list[float]:
    sgd = _sgd(2.0)
    scheduler = warmup_schedule(sgd, total_steps=total, **settings)["scheduler"]  # type: ignore[arg-type]
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0] / 2.0)
        sgd.step()
        scheduler.step()
    return seen


def test_the_rate_rises_falls_and_ends_at_zero() -> None:
    assert _rates(4, 5, warmup=0.5) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert _rates(4, 5, warmup=0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    one = _rates(4, 5, warmup=1)
    assert (one[0], one[-1]) == (1.0, 0.0), "one step of warm-up is over at once"
    cosine = [0.5 * (1 + math.cos(math.pi * done / 3)) for done in range(4)]
    assert _rates(4, 5, warmup=1, schedule="cosine") == pytest.approx([1.0, *cosine])
    assert _rates(4, 6, warmup="50%", schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert _rates(6, 3, warmup="1 epoch", steps_per_epoch=2) == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [(0.06, 6), ("6%", 6), (1, 1), (30, 30), ("30 steps", 30), ("2 epochs", 40), ("0.5 epoch", 10)],
)
def test_warmup_is_given_as_a_share_steps_or_epochs(warmup: float | str, steps: int) -> None:
    assert warmup_steps(warmup, total_steps=100, steps_per_epoch=20) == steps


@pytest.mark.parametrize(
    ("warmup", "steps", "message"),
    [
        (-0.1, 4, "warmup is -0.1"),
        ("soon", 4, "warmup is 'soon'"),
        (5, 4, "the fit has 4"),
        ("9 epochs", 4, "9 epochs, which is 9 optimizer steps"),
        (0.1, float("inf"), "max_epochs"),
    ],
)
def test_schedules_that_cannot_be(warmup: float | str, steps: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        warmup_schedule(_sgd(), warmup, steps)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        warmup_schedule(_sgd(), 0.1, 4, schedule="cosin")
