"""Heads of Hugging Face models, found by their interface: transformers is not imported."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.matching import inside


def _hugging_face_models(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost Hugging Face models."""
    found: list[str] = []
    for name, module in modules.items():
        is_model = hasattr(module, "base_model_prefix") and hasattr(module, "get_output_embeddings")
        if is_model and not any(inside(name, [outer]) or outer == "" for outer in found):
            found.append(name)
            yield name, module


def input_embeddings(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the input embeddings of Hugging Face models."""
    found = [
        model.get_input_embeddings()  # type: ignore[operator]
        for _, model in _hugging_face_models(modules)
    ]
    return [name for name, module in modules.items() if any(module is each for each in found)]


def _heads(modules: dict[str, nn.Module]) -> Iterator[tuple[str, bool]]:
    """Children beside the backbone of a model; whether they hold the output embeddings."""
    for prefix, model in _hugging_face_models(modules):
        backbone = getattr(model, str(model.base_model_prefix), None)
        output = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(backbone, nn.Module) or backbone is model:
            continue
        for child_name, child in model.named_children():
            if child is backbone or next(child.parameters(), None) is None:
                continue
            holds_output = any(module is output for module in child.modules())
            yield (f"{prefix}.{child_name}" if prefix else child_name), holds_output


def task_heads(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the heads that a Hugging Face task model adds to its backbone (``classifier``,
    ``qa_outputs``...).

    They are newly initialised when a pretrained backbone is loaded. A language-modelling head is
    none of them.
    """
    return [name for name, holds_output in _heads(modules) if not holds_output]


def output_heads(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layers that no preset adapts: output embeddings and task heads."""
    names = task_heads(modules)
    for _, model in _hugging_face_models(modules):
        output = model.get_output_embeddings()  # type: ignore[operator]
        names += [
            name for name, module in modules.items() if output is not None and module is output
        ]
    return names
