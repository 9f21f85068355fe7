"""Ranks redistributed by the variance that they explain (EVA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    initialize_from_inputs,
    inject_lora,
    redistribute_ranks,
)
from lightning_lora.errors import ConfigError
from lightning_lora.injection import require_injection
from tests.models import hugging_face
from tests.modules import PlainClassifier, dataset, make_trainer

IDS = torch.randint(3, 40, (6, 12), generator=torch.Generator().manual_seed(0))
# Layers with inputs of their own: among equal inputs it is arbitrary who gets a rank.
TARGETS = ["q_proj", "o_proj", "down_proj"]


def ranks(model: nn.Module) -> dict[str, int]:
    return {target.name: target.r for target in require_injection(model).plan.targets}


def test_peft_gives_the_same_ranks() -> None:
    peft = pytest.importorskip("peft")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch["attention_mask"][0, 7:] = 0
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(hugging_face("llama"), config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    layers = {
        name: theirs.base_model.model.get_submodule(name)
        for name, module in hugging_face("llama").named_modules()
        if name.endswith(tuple(TARGETS))
    }
    expected = {n: m.r["default"] for n, m in layers.items() if hasattr(m, "lora_A")}
    ours = hugging_face("llama")
    wanted = LoRAConfig(r=4, alpha=12, target_modules=TARGETS, init="eva")
    found = redistribute_ranks(ours, wanted, [batch], lambda b: ours(**b), rho=2.0)
    inject_lora(ours, found)
    assert ranks(ours) == expected
    assert len(set(expected.values())) > 1 and sum(expected.values()) == 4 * 6
    assert {target.scaling for target in require_injection(ours).plan.targets} == {3.0}
    for name, r in expected.items():
        assert layers[name].scaling["default"] == pytest.approx(3.0), (name, r)
    initialize_from_inputs(ours, [batch], lambda b: ours(**b))
    for name in expected:
        A: Any = ours.get_submodule(name).lora.A.detach()
        other = layers[name].lora_A.default.weight
        torch.testing.assert_close((A * other).sum(1).abs(), torch.ones(len(A)), atol=1e-3, rtol=0)


def test_a_layer_without_ranks_is_left_alone() -> None:
    # The second layer is given a point, and the third what spreads over everything.
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight.zero_()
    config = LoRAConfig(r=2, alpha=4, use_rslora=True)
    wrapped = nn.ModuleDict({"net": net})
    x = torch.randn(64, 8)
    found = redistribute_ranks(wrapped, config, [x], lambda x: net(x))
    assert found.exclude_modules == ["net.1", "net.2"]
    inject_lora(wrapped, found)
    # What two layers without any spread give up is more than the third may take.
    assert ranks(wrapped) == {"net.0": 4}
    assert require_injection(wrapped).plan.targets[0].scaling == pytest.approx(4 / 2**0.5)


def test_settings_that_leave_layers_out_already_still_do() -> None:
    def network() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        nn.init.zeros_(net[0].weight)
        return net

    for excluded, expected in (("0", r"(?:0)|(?:.*\.)?(?:1)"), (["0"], ["0", "1"])):
        net = network()
        config = LoRAConfig(r=2, exclude_modules=excluded)
        ends = torch.randn(64, 8)

        def run(x: torch.Tensor, net: nn.Sequential = net) -> None:
            net(x)
            net[2](x)

        found = redistribute_ranks(net, config, [ends], run)
        assert found.exclude_modules == expected
        inject_lora(net, found)
        assert ranks(net) == {"2": 4}


def test_a_fit_takes_the_settings(tmp_path: Path) -> None:
    model = PlainClassifier()
    batches = [batch[0] for batch in (dataset()[:8], dataset()[8:16])]
    config = redistribute_ranks(model, LoRAConfig(r=3, alpha=6), batches, model, rho=1.5)
    assert config.rank_pattern
    callback = LoRACallback(**config.to_dict(), verbose=False)
    make_trainer(tmp_path, callback, max_epochs=1).fit(model)
    assert set(ranks(model).values()) == {3, *(config.rank_pattern or {}).values()}


def test_what_cannot_be_is_said() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ConfigError, match=r"rho must be at least 1, got 0\.5"):
        redistribute_ranks(net, LoRAConfig(r=2), [], net, rho=0.5)
    with pytest.raises(ConfigError, match="reached none of the layers"):
        redistribute_ranks(net, LoRAConfig(r=2), [], net)
    branches = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.warns(UserWarning, match="never reached 1, which keep their rank"):
        config = redistribute_ranks(branches, LoRAConfig(r=2), [torch.randn(9, 6)], branches[0])
    assert config == LoRAConfig(r=2)
    names = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.ModuleDict({"a": nn.Linear(6, 6)})})
    other: Any = names["b"]

    def run(x: torch.Tensor) -> None:
        names["a"](torch.ones(5, 6))
        other["a"](x)

    with pytest.raises(ConfigError, match="'a' gets no rank, and no name can leave it out without"):
        redistribute_ranks(names, LoRAConfig(r=2), [torch.randn(9, 6)], run)
    inject_lora(net, r=2)
    with pytest.raises(ConfigError, match="as it is before LoRA"):
        redistribute_ranks(net, LoRAConfig(r=2), [], net)
