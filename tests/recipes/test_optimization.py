"""Parameter groups and the schedule."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.optimization import build_optimizer, parameter_groups, warmup_schedule


def _model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    return model


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


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [(0.5, [0.5, 1.0, 1.0, 0.5, 0.0]), (0, [1.0, 0.75, 0.5, 0.25, 0.0]), (1, None)],
)
def test_the_rate_rises_falls_and_ends_at_zero(warmup: float, rates: list[float] | None) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_schedule(sgd, warmup, total_steps=4)["scheduler"]
    seen = []
    for _ in range(5):
        seen.append(scheduler.get_last_lr()[0] / 2.0)
        sgd.step()
        scheduler.step()
    if rates is None:
        assert seen[0] == 1.0, "one step of warm-up is over at once"
        assert seen[-1] == 0.0
    else:
        assert seen == rates


@pytest.mark.parametrize(
    ("warmup", "steps", "message"),
    [(-0.1, 4, "warmup is -0.1"), (5, 4, "the fit has 4"), (0.1, float("inf"), "max_epochs")],
)
def test_schedules_that_cannot_be(warmup: float, steps: float, message: str) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=message):
        warmup_schedule(sgd, warmup, steps)
