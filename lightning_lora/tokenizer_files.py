"""The tokenizer that a fit used, in checkpoints and beside what is written from them.

A fit may change the tokenizer of its base: a chat template, a token to pad with, a limit. What was
changed is a few texts and numbers, which a checkpoint holds; the rest is in the base's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_lora.base_on_disk import side_files

# Where the metadata of a checkpoint has them.
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


@contextmanager
def tokenizer_files(folder: Path | None, metadata: Mapping[str, Any]) -> Iterator[list[Path]]:
    """The files of a base's tokenizer, with the settings that a fit gave it; inside they are there.

    Args:
        folder: The folder of the base; without one there are no files.
        metadata: What the fit's checkpoint says about its adapter.
    """
    found = {} if folder is None else {file.name: file for file in side_files(folder)}
    settings = metadata.get(KEY)
    with TemporaryDirectory() as scratch:
        if settings and any(name.startswith("tokenizer") for name in found):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
            if tokenizer_settings(tokenizer) != dict(settings):
                for name, value in settings.items():
                    setattr(tokenizer, name, value)
                tokenizer.save_pretrained(scratch)
                found |= {file.name: file for file in side_files(Path(scratch))}
        yield [found[name] for name in sorted(found)]
