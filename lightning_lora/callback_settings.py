"""What can be wrong with the settings that `LoRACallback` has beside those of `LoRAConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.freezing import DTYPES
from lightning_lora.quantized_merging import MERGE_BASES
from lightning_lora.validation import choice_problems, is_rank


def callback_problems(**settings: Any) -> list[str]:
    """One line for each problem.

    Args:
        **settings: The arguments of `LoRACallback` that are no fields of `LoRAConfig`.
    """
    return list(_problems(settings))


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from choice_problems("merge_from", settings["merge_from"], ("last", "best"))
    yield from choice_problems("merge_base", settings["merge_base"], MERGE_BASES)
    if settings["frozen_dtype"] is not None:
        yield from choice_problems("frozen_dtype", settings["frozen_dtype"], tuple(DTYPES))
    if not is_rank(settings["init_batches"]):
        found = settings["init_batches"]
        yield f"init_batches must be a whole number of at least 1, got {found!r}"
    for name in ("merge_on_fit_end", "exact_resume", "verbose"):
        if not isinstance(settings[name], bool):
            yield f"{name} must be true or false, got {settings[name]!r}"
    for name in ("init_from", "export_dir"):
        value = settings[name]
        if value is not None and not (isinstance(value, (str, Path)) and str(value)):
            yield f"{name} must be a path or null, got {value!r}"
