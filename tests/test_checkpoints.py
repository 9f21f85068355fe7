"""The optimizers' state finds its parameters by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.adapters import read_adapter
from lightning_lora.checkpoints import optimizer_names, optimizer_states, read_checkpoint
from lightning_lora.errors import CheckpointError
from lightning_lora.names import modules_by_name
from lightning_lora.stored import read_stored_adapter
from tests.models import mlp


def adam(model: nn.Module, *groups: list[str]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([{"params": [model.get_parameter(n) for n in g]} for g in groups])
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        assert name
    optimizer.step()
    return optimizer


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "optimizer_states": [optimizer.state_dict()],
        "lightning_lora": {"optimizers": optimizer_names([optimizer], modules_by_name(model))},
    }


def test_states_follow_their_parameters_into_another_order() -> None:
    model = mlp()
    first = adam(model, ["fc1.weight", "fc2.weight"], ["head.bias"])
    checkpoint = saved(model, first)
    assert checkpoint["lightning_lora"]["optimizers"] == [
        [["fc1.weight", "fc2.weight"], ["head.bias"]]
    ]
    second = adam(model, ["fc2.weight", "fc1.weight"], ["head.bias"])
    (state,) = optimizer_states(checkpoint, [second], model)
    second.load_state_dict(state)
    for name in ("fc1.weight", "fc2.weight", "head.bias"):
        parameter = model.get_parameter(name)
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])


def test_parameters_from_outside_the_module_keep_their_states() -> None:
    model, others = mlp(), [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.Adam([*others, *model.parameters()], lr=0.1)

    before = optimizer()
    for number, parameter in enumerate([*others, *model.parameters()]):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    before.step()
    (state,) = optimizer_states(saved(model, before), [optimizer()], model)
    for number, value in before.state_dict()["state"].items():
        assert torch.equal(state["state"][number]["exp_avg"], value["exp_avg"])


def test_a_file_without_names_goes_by_numbers() -> None:
    model = mlp()
    optimizer = adam(model, ["fc1.weight"])
    checkpoint = saved(model, optimizer)
    del checkpoint["lightning_lora"]["optimizers"]
    assert optimizer_states(checkpoint, [optimizer], model) == checkpoint["optimizer_states"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["fc1.weight"]], "only saved: fc2.weight"),
        ([["fc1.weight", "fc2.weight", "head.bias"]], "only now: head.bias"),
        ([["fc1.weight"], ["fc2.weight"]], "in 2 groups, and were in 1"),
    ],
)
def test_other_parameters_are_named(groups: list[list[str]], message: str) -> None:
    model = mlp()
    checkpoint = saved(model, adam(model, ["fc1.weight", "fc2.weight"]))
    with pytest.raises(CheckpointError, match=message):
        optimizer_states(checkpoint, [adam(model, *groups)], model)


def test_another_number_of_optimizers() -> None:
    model = mlp()
    optimizer = adam(model, ["fc1.weight"])
    with pytest.raises(CheckpointError, match=r"state of 1 optimizers, and .* returned 2"):
        optimizer_states(saved(model, optimizer), [optimizer, optimizer], model)


@pytest.mark.parametrize(
    "section",
    [
        {},
        5,
        {"config": {}, "targets": {}, "base": None},
        {"config": {}, "targets": {}, "base": {}},
        {
            "config": {},
            "targets": {"fc1": {"r": 2}},
            "base": {"fingerprint": "a", "name_or_path": "b", "parameters": 3},
        },
    ],
    ids=str,
)
def test_a_section_that_is_damaged_is_no_traceback(tmp_path: Path, section: Any) -> None:
    torch.save({"state_dict": {}, "lightning_lora": section}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is damaged: its 'lightning_lora' section"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_state_that_holds_nothing_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": [1], "lightning_lora": {}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is not a Lightning checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_newer_format_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new.ckpt"
    torch.save({"state_dict": {}, "lightning_lora": {"version": 99}}, path)
    for read in (read_checkpoint, read_stored_adapter, read_adapter):
        with pytest.raises(CheckpointError, match="format 99 by a newer lightning-lora"):
            read(path)
