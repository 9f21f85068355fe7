"""Every row of docs/architectures.md, on a model of that architecture."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import inject_lora, merge_lora, remove_lora
from tests.architectures import ARCHITECTURES, FILE, PRESETS, inputs_for, plan_for, table
from tests.attention import adapted_rows, distinct, rows_by_role
from tests.models import assert_same, hugging_face, shake, snapshot

TOKENS = torch.arange(3, 12)[None]
# Images and sound are no tokens of which one could stand alone, and gpt-oss has a sink beside it.
KNOWN_BY_NAME = ("vit", "clip", "wav2vec2", "gpt_oss")
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES.values())


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        out = model(**inputs_for(name))
    name_of_result = {"clip": "logits_per_image", "roberta": "start_logits"}.get(name, "logits")
    result: Tensor = getattr(out, name_of_result)
    return result


@every_architecture
def test_qv_is_the_query_and_the_value_projection_of_every_attention(name: str) -> None:
    model = distinct(hugging_face(name))
    plan = plan_for(model, "qv")
    if name in KNOWN_BY_NAME:
        counts = Counter(target.name.rpartition(".")[-1] for target in plan.targets)
        layers = 4 if name == "clip" else 2
        assert counts == {"q_proj": layers, "v_proj": layers}
        return
    found: dict[str, list[str]] = {}
    for target in plan.targets:
        roles = rows_by_role(model, target.name, TOKENS)
        attention = found.setdefault(target.name.rpartition(".")[0], [])
        if target.slices is None:
            (role,) = (part for part, rows in roles.items() if rows)
            attention.append(role)
        else:
            assert adapted_rows(target) == {"q": roles["q"], "v": roles["v"]}
            attention += ["q", "v"]
    assert all(sorted(roles) == ["q", "v"] for roles in found.values())
    # ALBERT's layers are one, and T5's decoder attends to itself and to the encoder.
    assert len(found) == {"albert": 1, "t5": 6}.get(name, 2)


@every_architecture
@pytest.mark.parametrize("preset", PRESETS)
def test_from_injection_to_removal(name: str, preset: str) -> None:
    model = hugging_face(name).requires_grad_(False)
    base, before = output(model, name), snapshot(model)
    plan = inject_lora(model, r=2, alpha=6, target_modules=preset)
    assert plan.lora_parameters == sum(
        p.numel() for n, p in model.named_parameters() if ".lora." in n
    )
    assert torch.equal(output(model, name), base)
    shake(model)
    adapted = output(model, name)
    assert (adapted - base).abs().max() > 0.02 * base.abs().max()
    merge_lora(model)
    torch.testing.assert_close(output(model, name), adapted, atol=1e-4, rtol=1e-3)
    remove_lora(model)
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, name), base)


def test_the_page_is_what_the_models_say() -> None:
    assert FILE.read_text(encoding="utf-8") == table(), "run python -m tests.architectures"
