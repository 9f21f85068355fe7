"""What the presets say of what they leave out, or cannot find."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora
from lightning_lora.errors import TargetError
from lightning_lora.plan import Plan
from tests.models import hugging_face


class Attention(nn.Module):
    """An attention layer's projections, under the names that are given."""

    def __init__(self, *names: str, layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 8)):
        super().__init__()
        for name in names:
            self.add_module(name, layer())


def plan_of(attention: nn.Module, preset: str) -> Plan:
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": attention, "fc": nn.Linear(8, 8)})})
    return inject_lora(model, r=2, alpha=4, target_modules=preset)


@pytest.mark.parametrize(
    "names",
    [
        ("to_q", "to_k", "to_v"),
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("linear_q", "linear_k", "linear_v"),
        ("q_head", "k_head", "v_head"),
        ("query_global", "key_global", "value_global"),
        ("projection_query", "projection_key", "projection_value"),
        ("layout_query", "layout_key", "layout_value"),
        ("project_q", "project_k", "project_v"),
    ],
)
def test_queries_and_values_by_their_names(names: tuple[str, ...]) -> None:
    plan = plan_of(Attention(*names), "qv")
    assert [t.name for t in plan.targets] == [f"block.attn.{names[0]}", f"block.attn.{names[2]}"]
    assert not plan.skipped


@pytest.mark.parametrize("name", ["to_kv", "kv", "kv_proj", "linear_kv", "Wkv", "qkv_linear"])
def test_keys_and_values_together_are_not_passed_over(name: str) -> None:
    with pytest.raises(TargetError, match=f"{name}' holds several .* for Attention.*leave it out"):
        plan_of(Attention("to_q", name), "qv")


@pytest.mark.parametrize("preset", ["qv", "attention"])
def test_projections_that_are_convolutions_are_pointed_out(preset: str) -> None:
    attention = Attention("query", "value", layer=lambda: nn.Conv1d(8, 8, 1))
    with pytest.raises(
        TargetError, match=r"'block.attn.query' is a Conv1d, .*target_modules=\['query', 'value'\]"
    ):
        plan_of(attention, preset)


def test_attention_without_a_value_projection_by_a_known_name_is_listed() -> None:
    plan = plan_of(Attention("q_proj", "values_text"), "qv")
    ((name, reason),) = plan.skipped
    assert name == "block.attn" and "no W_v by a known name, so that W_q is adapted alone" in reason


def test_the_fused_projections_of_linear_attention_are_listed() -> None:
    model = nn.ModuleDict(
        {"linear": Attention("in_proj_qkvz", "out_proj"), "full": Attention("q_proj", "v_proj")}
    )
    plan = inject_lora(model, r=2, alpha=4, target_modules="qv")
    assert [target.name for target in plan.targets] == ["full.q_proj", "full.v_proj"]
    ((name, reason),) = plan.skipped
    assert name == "linear.in_proj_qkvz" and "adapted by name alone" in reason


def test_latent_attention_with_a_latent_for_queries_too() -> None:
    attention = Attention("q_a_proj", "q_b_proj", "kv_b_proj")
    with pytest.raises(TargetError, match=r"keeps W_k and W_v together in 'block.attn.kv_b_proj'"):
        plan_of(attention, "qv")


def test_recurrent_layers_are_listed_where_every_linear_layer_is_asked_for() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "fc": nn.Linear(8, 2)})
    plan = inject_lora(model, r=2, alpha=4)
    assert plan.skipped == (("rnn", "LSTM has matrices, but not those of linear layers"),)
    with pytest.raises(TargetError, match="'rnn' cannot be adapted: LSTM has matrices"):
        inject_lora(nn.ModuleDict({"rnn": nn.LSTM(8, 8)}), r=2, alpha=4)


def test_experts_are_no_matter_of_queries_and_values() -> None:
    plan = inject_lora(hugging_face("mixtral"), r=2, alpha=4, target_modules="qv")
    assert not plan.skipped


def test_biases_that_timm_adds_in_one_product_with_the_weight() -> None:
    class Beit(nn.Module):
        def __init__(self, separate: bool) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
            self.q_bias = nn.Parameter(torch.zeros(8))
            self.qkv_bias_separate = separate

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.qkv.weight)

    plan = plan_of(Beit(False), "attention")
    assert [target.name for target in plan.targets] == ["block.attn.proj"]
    assert plan.skipped[0][0] == "block.attn.qkv" and "Beit reads its weight" in plan.skipped[0][1]
    assert len(plan_of(Beit(True), "attention").targets) == 2
