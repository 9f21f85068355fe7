"""What the factors of PiSSA and OLoRA started from, found again in the files of the base.

PEFT takes the start out of the base's weights and does not save it; a checkpoint of this project
holds it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.initialization import principal_factors
from lightning_lora.injection import require_injection
from lightning_lora.names import modules_by_name
from lightning_lora.start import START, keeps_start, starts
from lightning_lora.state import trained_shapes
from lightning_lora.stored import StoredAdapter
from lightning_lora.weight_files import StoredTensors, weight_places


def starts_from_files(
    adapter: StoredAdapter, root: nn.Module, part: str, folder: Path
) -> dict[str, Tensor]:
    """The starts that an adapter in PEFT's format lacks, by the model's names; else none.

    Args:
        adapter: The adapter.
        root: Its model without weights, adapted.
        part: Path of the Hugging Face model in it.
        folder: The folder of the base.

    Raises:
        CheckpointError: The base's files do not hold the weights one by one.
    """
    init = adapter.config.init
    if not (adapter.peft and keeps_start(init)) or starts(adapter.state):
        return {}
    record, modules = require_injection(root), modules_by_name(root)
    prefix = f"{part}." if part else ""
    found: dict[str, Tensor] = {}
    with ExitStack() as files:
        try:
            own = {name.removeprefix(prefix) for name in trained_shapes(record)}
            stored = StoredTensors(
                weight_places(root.get_submodule(part), str(folder), without=own), files
            )
            for target in record.plan.targets:
                weight = stored[f"{target.name}.{target.weights[0]}".removeprefix(prefix)]
                # Of a sketch the seed is not known, neither to PEFT nor here.
                pair = principal_factors(modules[target.name], weight.float(), target, init, "0")
                for leaf, value in zip(START.values(), pair, strict=True):
                    found[f"{target.name}.lora.{leaf}"] = value
        except (ConfigError, KeyError) as error:
            raise CheckpointError(
                f"{adapter.path} started by init_lora_weights={init!r}, which PEFT does not save: "
                f"it has to be computed of the weights of the base, and in {folder} these could "
                f"not be read ({error}). Load it with load_adapter, and use merge_lora or "
                "save_adapter there."
            ) from error
    return found
