"""The tokenizer that a fit used, in checkpoints and beside what is written from them.

A fit may change the tokenizer of its base: a chat template, a token to pad with, a limit. What was
changed is a few texts and numbers, which a checkpoint holds; the rest is in the base's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.base_on_disk import side_files

KEY = "tokenizer"
_SETTINGS = ("chat_template", "pad_token", "model_max_length")


def tokenizer_of(module: Any, data: Any) -> Any:
    """The tokenizer that a LightningModule or its data module has as ``tokenizer``, or ``None``."""
    return getattr(module, "tokenizer", None) or getattr(data, "tokenizer", None)


def tokenizer_settings(tokenizer: Any) -> dict[str, Any] | None:
    """What a fit may have changed in a tokenizer, in primitives; ``None`` without a tokenizer."""
    if not hasattr(tokenizer, "save_pretrained"):
        return None
    return {
        name: value
        for name in _SETTINGS
        if isinstance(value := getattr(tokenizer, name, None), (str, int))
    }


def tokenizer_files(folder: Path, settings: Mapping[str, Any] | None, scratch: Path) -> list[Path]:
    """The files of a base's tokenizer, with the settings that a fit gave it.

    Args:
        folder: The folder of the base.
        settings: From `tokenizer_settings`; ``None`` where they are not known.
        scratch: A folder for files that are not as in the base.
    """
    found = {file.name: file for file in side_files(folder)}
    if settings and any(name.startswith("tokenizer") for name in found):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer_settings(tokenizer) != dict(settings):
            for name, value in settings.items():
                setattr(tokenizer, name, value)
            tokenizer.save_pretrained(scratch)
            found |= {file.name: file for file in side_files(scratch)}
    return [found[name] for name in sorted(found)]
