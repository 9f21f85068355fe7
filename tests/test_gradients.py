from __future__ import annotations

import torch
from torch import nn

from lightning_lora.gradients import gradients_of, restore_gradients


def test_dense_and_sparse_gradients_come_back() -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        layers = {"table": nn.Embedding(5, 3, sparse=True), "fc": nn.Linear(3, 2)}
        return nn.ModuleDict(layers | {"idle": nn.Linear(3, 3)})

    model = make()
    model["fc"](model["table"](torch.tensor([1, 3]))).square().sum().backward()
    kept = gradients_of(model)
    again = make()
    restore_gradients(again, kept)
    assert again["idle"].weight.grad is None
    assert again["table"].weight.grad.is_sparse
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = again.get_parameter(name).grad
            assert found is not None
            assert torch.equal(found.to_dense(), parameter.grad.to_dense())
    # What is accumulated further does not reach what was kept.
    again["fc"](again["table"](torch.tensor([1]))).sum().backward()
    assert kept["table.weight"].coalesce().indices().tolist() == [[1, 3]]
