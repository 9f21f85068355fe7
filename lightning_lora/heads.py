"""Heads of Hugging Face models, found by their interface: transformers is not imported."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_lora.matching import inside

# What stands beside the backbone of these was trained with it.
_PRETRAINED = re.compile(
    r"\w*(LMHeadModel"
    r"|For(MaskedLM|CausalLM|PreTraining|ConditionalGeneration|MaskedImageModeling"
    r"|TextToSpeech|SpeechToSpeech))"
)


def _is_hugging_face(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix") and hasattr(module, "get_output_embeddings")


def _hugging_face_models(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost Hugging Face models."""
    found: list[str] = []
    for name, module in modules.items():
        if _is_hugging_face(module) and not any(inside(name, [o]) or o == "" for o in found):
            found.append(name)
            yield name, module


def input_embeddings(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the input embeddings of Hugging Face models."""
    found = [
        model.get_input_embeddings()  # type: ignore[operator]
        for _, model in _hugging_face_models(modules)
    ]
    return [name for name, module in modules.items() if any(module is each for each in found)]


def task_heads(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the heads that a Hugging Face task model adds to its backbone (``classifier``,
    ``qa_outputs``...).

    They are newly initialised when a pretrained backbone is loaded. A language-modelling head is
    none of them, and neither are the other parts that were pretrained beside it.
    """
    names = []
    for prefix, model in _hugging_face_models(modules):
        backbone = getattr(model, str(model.base_model_prefix), None)
        if not isinstance(backbone, nn.Module) or backbone is model:
            continue
        if _PRETRAINED.fullmatch(type(model).__name__):
            continue
        output = model.get_output_embeddings()  # type: ignore[operator]
        for child_name, child in model.named_children():
            if child is backbone or next(child.parameters(), None) is None:
                continue
            if not any(module is output for module in child.modules()):
                names.append(f"{prefix}.{child_name}" if prefix else child_name)
    return names


def output_heads(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layers that no preset adapts: output embeddings and task heads."""
    # The decoder of a larger model may be one with a head of its own.
    outputs = [
        module.get_output_embeddings()  # type: ignore[operator]
        for module in modules.values()
        if _is_hugging_face(module)
    ]
    found = {id(output) for output in outputs if output is not None}
    return [
        *task_heads(modules),
        *(name for name, module in modules.items() if id(module) in found),
    ]
