"""An adapter on disk as the start of a fit, compared with the settings of the fit first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError
from lightning_lora.injection import require_injection
from lightning_lora.matching import value_for
from lightning_lora.metadata import METADATA_KEY, audit_metadata
from lightning_lora.names import corresponding, listed, persistent_buffers
from lightning_lora.peft_ties import shared_names, without_copies
from lightning_lora.start import keeps_start
from lightning_lora.state import audit_state, trained_shapes
from lightning_lora.stored import StoredAdapter, read_stored_adapter

_OF_FINDERS = (".lr_find_", ".scale_batch_size_")


def resumes(trainer: Trainer) -> bool:
    """Whether a fit goes on from a checkpoint.

    Where the strategy shards, a Trainer knows only after the strategy's setup. Finders of learning
    rates and batch sizes leave theirs behind, which are no longer there.
    """
    path = trainer.ckpt_path
    return path is not None and not Path(str(path)).name.startswith(_OF_FINDERS)


def starting_state(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The state of an adapter under the names of a model that was adapted with the same settings.

    Args:
        model: The module that LoRA was injected into.
        path: A Lightning checkpoint of `LoRACallback`, or a folder in PEFT format, also of the same
            model under another path.

    Raises:
        CheckpointError: The adapter is missing or damaged, or its settings, layers or base are not
            those of the model; names what differs.
    """
    adapter = read_stored_adapter(path)
    if adapter.peft and keeps_start(adapter.config.init):
        raise CheckpointError(
            f"{path} started by init_lora_weights={adapter.config.init!r}, and PEFT does not save "
            "that start. Make a checkpoint of it, which holds it (lightning-lora convert), and "
            "give init_from the checkpoint."
        )
    shared = shared_names(model).values()
    known = [
        *trained_shapes(require_injection(model)),
        *persistent_buffers(model),
        *(name for names in shared for name in names),
    ]
    names = corresponding(adapter.state, known)
    state = {names.get(name, name): tensor for name, tensor in adapter.state.items()}
    if adapter.peft:
        _compare(model, adapter, names, str(path))
        state = without_copies(model, state, str(path))
    else:
        audit_metadata(model, _renamed(adapter, names), str(path))
    audit_state(model, state, str(path))
    return state


def _renamed(adapter: StoredAdapter, names: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a checkpoint with the model's names of layers."""
    layers = {
        name.rpartition(".lora.")[0]: other.rpartition(".lora.")[0] for name, other in names.items()
    }
    metadata: Mapping[str, Any] = adapter.checkpoint[METADATA_KEY]
    return {
        **metadata,
        "targets": {layers.get(n, n): target for n, target in metadata["targets"].items()},
    }


def _compare(
    model: nn.Module, adapter: StoredAdapter, names: Mapping[str, str], source: str
) -> None:
    """Compare what a folder in PEFT format says of its settings with the model's."""
    record, theirs = require_injection(model), adapter.config
    ours = {target.name: target for target in record.plan.targets}
    differences = set()
    layers = []
    for key in adapter.state:
        layer = key.removesuffix(".lora.A")
        if layer == key:
            continue
        name = names.get(key, key).removesuffix(".lora.A")
        layers.append(name)
        r = value_for(theirs.rank_pattern, layer, theirs.r)
        alpha = value_for(theirs.alpha_pattern, layer, theirs.alpha)
        if name in ours:
            pairs = (("r", r, ours[name].r), ("alpha", alpha, ours[name].alpha))
            differences |= {f"{k}: {a} in the adapter, {b} now" for k, a, b in pairs if a != b}
    for what, value, now in (
        ("bias", theirs.bias, record.config.bias),
        ("use_rslora", theirs.use_rslora, record.config.use_rslora),
    ):
        if value != now:
            differences.add(f"{what}: {value!r} in the adapter, {now!r} now")
    for only, what in (
        ([name for name in layers if name not in ours], "in the adapter alone"),
        ([name for name in ours if name not in layers], "here alone"),
    ):
        if only:
            differences.add(f"target_modules: adapted {what}: {listed(only, limit=3)}")
    if differences:
        raise CheckpointError(
            f"{source} was trained with other LoRA settings; nothing was loaded.\n  "
            + "\n  ".join(sorted(differences))
            + "\n  Set them as they are in the adapter, or leave init_from out."
        )
