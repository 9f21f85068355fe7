"""What a fit leaves for other tools: the merged model, and the adapter beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_model
from torch import nn

from lightning_lora.files import replacing_directory
from lightning_lora.injection import require_injection
from lightning_lora.interop import save_adapter
from lightning_lora.merging import merge_lora, unmerge_lora


def export_model(module: LightningModule, directory: Path, trainer: Trainer) -> dict[str, Path]:
    """Write ``merged`` and ``adapter`` below a folder.

    A Hugging Face model inside the LightningModule is written with ``save_pretrained``, together
    with the tokenizer found as ``tokenizer`` on the LightningModule or its data module; any other
    model as one safetensors file.

    Args:
        module: The LightningModule that LoRA was injected into, merged or not.
        directory: The folder that holds both.
        trainer: The Trainer that has it.

    Returns:
        The folders by what they hold.

    Raises:
        CheckpointError: The adapter holds what PEFT cannot express.
    """
    part = _hugging_face_part(module)
    adapter = save_adapter(module, directory / "adapter", part or "")
    merged = directory / "merged"
    with _merged(module), replacing_directory(merged) as fresh:
        if part is None:
            save_model(module, str(fresh / "model.safetensors"))
        else:
            model = module.get_submodule(part)
            with _untied_config(model):
                model.save_pretrained(fresh)  # type: ignore[operator]
            tokenizer = getattr(module, "tokenizer", None) or getattr(
                getattr(trainer, "datamodule", None), "tokenizer", None
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
    return {"merged model": merged, "adapter": adapter}


def _hugging_face_part(module: nn.Module) -> str | None:
    """Path of the one Hugging Face model that holds every adapted layer, or ``None``."""
    targets = [target.name for target in require_injection(module).plan.targets]
    for name, child in module.named_modules():
        is_model = hasattr(child, "save_pretrained") and hasattr(child, "config")
        if is_model and all(target.startswith(f"{name}." if name else "") for target in targets):
            return name
    return None


@contextmanager
def _merged(module: nn.Module) -> Iterator[None]:
    was_merged = require_injection(module).merged
    merge_lora(module)
    try:
        yield
    finally:
        if not was_merged:
            unmerge_lora(module)


@contextmanager
def _untied_config(model: Any) -> Iterator[None]:
    """A head that a merge has untied must not be tied again when the export is loaded."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if not tied or head is None or head.weight is embeddings.weight:
        yield
        return
    model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        model.config.tie_word_embeddings = True
