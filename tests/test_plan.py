from __future__ import annotations

import re

from torch import nn

from lightning_lora import LoRAConfig
from lightning_lora.plan import Plan, Target
from lightning_lora.targeting import make_plan
from tests.models import AttentionNet, TiedLinears, mlp


def rows(plan: Plan) -> list[str]:
    """The lines of the table, runs of blanks and rules made one blank."""
    return [
        re.sub(r"[\s│┃─━┏┓┡┩└┘├┤┼┴┬╇┌┐]+", " ", line).strip() for line in str(plan).splitlines()
    ]


def test_the_table() -> None:
    config = LoRAConfig(
        r=2,
        alpha=6,
        target_modules=["fc1", "fc2"],
        rank_pattern={"fc2": 4},
        bias="all",
        modules_to_save=["head"],
    )
    table = rows(make_plan(mlp(), config))
    assert table[0] == "LoRA"
    for row in (
        "target_modules fc1 1 modules matched",
        "target_modules fc2 1 modules matched",
        "rank_pattern fc2 1 modules matched",
        "Linear, r=2, alpha=6 1 layers adapted",
        "Linear, r=4, alpha=6 1 layers adapted",
        "parameters 104 LoRA factors",
        "18 biases",
        "27 trained whole (head)",
        "trainable 149 49.8 % of all",
        "total 289",
    ):
        # 289 with the factors: 185 in the base.
        assert row.replace("49.8", _share(149, 289)) in table, (row, table)


def test_patterns_of_one_layer_each_are_summed_up() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    config = LoRAConfig(r=2, rank_pattern={str(index): 1 + index % 2 for index in range(20)})
    table = rows(make_plan(net, config))
    assert "rank_pattern (20 patterns) 20 modules matched" in table
    assert "Linear, r=1, alpha=16 10 layers adapted" in table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}"


def test_what_is_left_alone_is_said_with_the_reason() -> None:
    text = " ".join(rows(make_plan(AttentionNet(), LoRAConfig(dropout=0.1))))
    assert "left alone 3 PyTorch gives nn.MultiheadAttention no place for dropout" in text
    assert "encoder.layers.0.self_attn, encoder.layers.1.self_attn, attention" in text
    assert "it is run by 'attention', which cannot be adapted: PyTorch gives" in text


def test_expressions_are_shown_as_they_are() -> None:
    pattern = r"[a-z]+\.(fc1|fc2|" + "[/b]x" * 20 + ")"
    plan = make_plan(nn.ModuleDict({"net": mlp()}), LoRAConfig(target_modules=pattern))
    # Long ones go over several lines, the count stays beside them.
    assert pattern in "".join(re.sub(r"\s{2,}.*", "", row) for row in _cells(plan))
    assert any(row.endswith(" 2 modules matched") for row in rows(plan))


def _cells(plan: Plan) -> list[str]:
    lines = [line.strip(" │┃").split("│")[0].strip() for line in str(plan).splitlines()]
    return [line.removeprefix("target_modules ") for line in lines]


def test_shared_factors_count_once() -> None:
    plan = make_plan(TiedLinears(), LoRAConfig(r=2, alpha=6))
    assert plan.lora_parameters == plan.trainable_parameters == 24
    assert plan.total_parameters == plan.base_parameters + 24 == 48 + 24


def test_parameters_of_a_target() -> None:
    target = Target("x", "Linear", 2, 6, 3.0, (2, 5), (7, 2))
    assert target.parameters == 24
