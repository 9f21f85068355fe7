from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from lightning_lora import inject_lora
from lightning_lora.heads import output_heads, task_heads
from lightning_lora.names import modules_by_name

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}


def build(kind: str, **settings: Any) -> nn.Module:
    config = kind.partition("For")[0].removesuffix("LMHeadModel")
    model: nn.Module = getattr(transformers, kind)(
        getattr(transformers, f"{config}Config")(**{**SIZE, **settings})
    )
    return model


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("BertForSequenceClassification", ["classifier"]),
        ("BertForQuestionAnswering", ["qa_outputs"]),
        ("ElectraForTokenClassification", ["classifier"]),
        # Pretrained with the backbone, whatever stands beside the output embeddings.
        ("ElectraForMaskedLM", []),
        ("ElectraForPreTraining", []),
        ("BertForPreTraining", []),
        ("BertLMHeadModel", []),
    ],
)
def test_task_heads_are_those_that_are_new(kind: str, heads: list[str]) -> None:
    model = build(kind)
    assert task_heads(modules_by_name(model)) == heads
    assert inject_lora(model, r=2, alpha=4, modules_to_save="auto").saved_modules == tuple(heads)


def test_a_task_head_beside_a_language_modelling_head() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    modules = modules_by_name(transformers.GPT2DoubleHeadsModel(config))
    assert task_heads(modules) == ["multiple_choice_head"]
    assert output_heads(modules) == ["multiple_choice_head", "lm_head"]


def test_a_head_that_a_module_of_ones_own_adds_to_a_language_model() -> None:
    class WithValues(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.value_head = nn.Linear(16, 1)

    model = WithValues(transformers.LlamaConfig(**SIZE))
    assert task_heads(modules_by_name(model)) == ["value_head"]


def test_the_output_embeddings_of_a_decoder_inside_are_not_adapted() -> None:
    text = {**SIZE, "encoder_hidden_size": 16}
    vision = {**SIZE, "image_size": 32, "patch_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.BlipForQuestionAnswering(config)
    assert model.get_output_embeddings() is None
    plan = inject_lora(model, r=2, alpha=4)
    names = [target.name for target in plan.targets]
    assert "text_decoder.cls.predictions.decoder" not in names
    assert "text_decoder.cls.predictions.transform.dense" in names
