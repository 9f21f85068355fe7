"""What a fit leaves for other tools: the merged model, and the adapter beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_model
from torch import nn

from lightning_lora.errors import CheckpointError
from lightning_lora.files import replacing_directory
from lightning_lora.injection import require_injection
from lightning_lora.interop import save_adapter
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.names import modules_by_name
from lightning_lora.state import adapter_state_dict


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
        The folders by what they hold. An adapter that PEFT cannot express is left out with a
        warning.
    """
    part = _hugging_face_part(module)
    exported = {}
    try:
        exported["adapter"] = save_adapter(module, directory / "adapter", part or "")
    except CheckpointError as error:
        # At the end of a fit, one export that cannot be must not cost the other.
        rank_zero_warn(f"The adapter was not exported: {error}")
    exported["merged model"] = merged = directory / "merged"
    with _merged(module), replacing_directory(merged) as fresh:
        if part is None:
            save_model(module, str(fresh / "model.safetensors"))
        else:
            model = module.get_submodule(part)
            with _untied_config(model), _without_progress_bar():
                model.save_pretrained(fresh)  # type: ignore[operator]
            tokenizer = getattr(module, "tokenizer", None) or getattr(
                getattr(trainer, "datamodule", None), "tokenizer", None
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
    return exported


def _hugging_face_part(module: nn.Module) -> str | None:
    """Path of the one Hugging Face model that holds everything that was trained, or ``None``."""
    trained = list(adapter_state_dict(module))
    for name, child in modules_by_name(module).items():
        is_model = hasattr(child, "save_pretrained") and hasattr(child, "config")
        if is_model and all(key.startswith(f"{name}." if name else "") for key in trained):
            return name
    return None


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
