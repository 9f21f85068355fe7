"""The table of what the presets adapt on each architecture.

``python -m tests.architectures`` writes it to docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig
from lightning_lora.plan import Plan, Target
from lightning_lora.targeting import make_plan
from tests.models import hugging_face

FILE = Path(__file__).parents[1] / "docs/architectures.md"
PRESETS = ("qv", "attention", "all-linear")
# What the architecture is called, and its name in tests/models.py.
ARCHITECTURES = {
    "BERT": "bert",
    "RoBERTa": "roberta",
    "DeBERTa-v2, v3": "deberta-v2",
    "DistilBERT": "distilbert",
    "ELECTRA": "electra",
    "ALBERT": "albert",
    "ModernBERT": "modernbert",
    "GPT-2": "gpt2",
    "GPT-BigCode": "gpt_bigcode",
    "GPT-NeoX": "gpt_neox",
    "CodeGen": "codegen",
    "OPT": "opt",
    "BLOOM": "bloom",
    "MPT": "mpt",
    "Persimmon": "persimmon",
    "Falcon": "falcon, groups",
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen3": "qwen3",
    "Gemma-3": "gemma3",
    "Phi-3": "phi3",
    "Mixtral": "mixtral",
    "Qwen3-MoE": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "ViT": "vit",
    "CLIP": "clip",
    "Wav2Vec2": "wav2vec2",
    "T5": "t5",
}
_HEADER = """# What the presets adapt

The last components of the names of the layers that each value of `target_modules` adapts, on models
of `transformers` built from small configurations; after a fused projection stand the parts of it
that get factors of their own. "Trained whole" is what `modules_to_save="auto"` adds, "left alone"
what the printed plan says about layers that a preset passes over. The output embedding (`lm_head`)
is never adapted by a preset.

`tests/test_architectures.py` checks every row on its model: the layers of `"qv"` are the paper's
W_q and W_v, found out from what attention computes, the output is unchanged at first, and merging
gives what the adapted model computed. `python -m tests.architectures` writes this page.

| architecture | `"qv"` | `"attention"` | `"all-linear"` | trained whole | left alone |
| --- | --- | --- | --- | --- | --- |
"""


def inputs_for(name: str) -> dict[str, Tensor]:
    """A small batch for a model of tests/models.py."""
    tokens = torch.arange(3, 21).reshape(2, 9)
    pixels = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "wav2vec2":
        return {"input_values": torch.linspace(-1, 1, 800).sin().reshape(2, 400)}
    inputs = {"input_ids": tokens}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens
    return {**inputs, "pixel_values": pixels} if name == "clip" else inputs


def plan_for(model: nn.Module, preset: str) -> Plan:
    """What a preset adapts."""
    return make_plan(model, LoRAConfig(r=2, alpha=6, target_modules=preset))


def table() -> str:
    """The page, as it should be."""
    rows = []
    for title, name in ARCHITECTURES.items():
        model = hugging_face(name)
        plans = [plan_for(model, preset) for preset in PRESETS]
        cells = [_names(map(_label, plan.targets)) for plan in plans]
        skipped = (name.rpartition(".")[-1] for name, _ in plans[-1].skipped)
        cells += [_names(plans[-1].saved_modules), _names(skipped)]
        rows.append(f"| {title} | {' | '.join(cells)} |\n")
    return _HEADER + "".join(rows)


def _label(target: Target) -> str:
    parts = f" ({', '.join(target.slices.adapted)})" if target.slices else ""
    return target.name.rpartition(".")[-1] + parts


def _names(names: Iterable[str]) -> str:
    marked = (f"`{name.split(' ')[0]}`{name[len(name.split(' ')[0]) :]}" for name in names)
    return ", ".join(dict.fromkeys(marked))


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(table(), encoding="utf-8")
