"""Adapters on disk: PEFT-format folders are written and read, Lightning checkpoints are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.config import LoRAConfig
from lightning_lora.directories import is_directory
from lightning_lora.errors import CheckpointError
from lightning_lora.files import replacing_directory
from lightning_lora.injection import inject_lora, injection_of, require_injection
from lightning_lora.merging import merge_lora, unmerge_lora
from lightning_lora.metadata import METADATA_KEY, audit_metadata
from lightning_lora.model_card import Card, write_card
from lightning_lora.names import modules_by_name
from lightning_lora.peft_convolutions import grouped_from_peft
from lightning_lora.peft_format import (
    from_peft_config,
    from_peft_tensors,
    to_peft_config,
    to_peft_tensors,
)
from lightning_lora.peft_reading import CONFIG_FILE, INIT, WEIGHTS_FILE, read_peft_files
from lightning_lora.peft_ties import without_copies
from lightning_lora.plan import Plan
from lightning_lora.removal import remove_lora
from lightning_lora.sharded import all_wholes, is_sharded
from lightning_lora.start import keeps_start, starts
from lightning_lora.state import adapter_state_dict, base_buffers, load_adapter_state_dict
from lightning_lora.tokens import CHILD

# The settings, the state, and the metadata that only checkpoints have.
Source: TypeAlias = tuple[LoRAConfig, dict[str, Tensor], Mapping[str, Any] | None]


def save_adapter(model: nn.Module, directory: str | Path, part: str = "") -> Path:
    """Write the adapter as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Of a sharded model every rank has to call this; rank 0 writes.

    Args:
        model: The module that LoRA was injected into, merged or not.
        directory: The folder; replaced as a whole once the new one is complete, but for a
            README.md, which stays. Where there is none, a model card is written.
        part: Path of the submodule that the adapter is meant for, for instance the Hugging Face
            model inside a LightningModule.

    Returns:
        The folder.

    Raises:
        ConfigError: The model has no LoRA.
        CheckpointError: The adapter holds what PEFT cannot express, or NaN.
    """
    state = adapter_state_dict(model)
    wholes = all_wholes(state)
    if any(map(is_sharded, state.values())) and torch.distributed.get_rank() != 0:
        return Path(directory)
    return write_adapter(model, directory, part, wholes)


def write_adapter(
    model: nn.Module,
    directory: str | Path,
    part: str,
    state: Mapping[str, Tensor],
    files: Sequence[Path] = (),
    **facts: Any,
) -> Path:
    """`save_adapter` with the adapter's state in whole tensors at hand; in one process.

    Args:
        model: As for `save_adapter`; its weights may be on the meta device.
        directory: The folder.
        part: As for `save_adapter`.
        state: The adapter's state.
        files: Further files to put into the folder.
        **facts: What the model card says beside settings and sizes, see `Card`.
    """
    refuse_non_finite(state)
    prefix = f"{part}." if part else ""
    tensors, config = to_peft_tensors(model, prefix, state), to_peft_config(model, prefix)
    card = Card(
        base=config["base_model_name_or_path"],
        config=config,
        settings=require_injection(model).config.to_dict(),
        parameters=sum(tensor.numel() for tensor in state.values()),
        **facts,
    )
    with replacing_directory(directory) as fresh:
        made = {"format": "pt", INIT: require_injection(model).config.init}
        save_file(tensors, fresh / WEIGHTS_FILE, metadata=made)
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        write_card(card, fresh, Path(directory))
        for file in files:
            shutil.copyfile(file, fresh / file.name)
    return Path(directory)


def refuse_non_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to hand on an adapter that is none.

    Args:
        state: Its tensors by name.

    Raises:
        CheckpointError: One of them holds NaN or infinity.
    """
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"Not written: {name} holds NaN or infinity, so training diverged. Use an earlier "
                "checkpoint."
            )


def load_adapter(model: nn.Module, path: str | Path, strict_base: bool = True) -> Plan:
    """Load an adapter into a model, injecting LoRA with the adapter's own settings where the model
    has none.

    Args:
        model: The bare model, or one that was adapted with the same settings. A checkpoint of a
            LightningModule may be loaded into the model inside it.
        path: A Lightning checkpoint (``.ckpt``, a file or a sharded folder) of `LoRACallback`, or a
            folder in PEFT format.
        strict_base: Refuse a checkpoint whose base has another fingerprint. PEFT folders record
            none.

    Returns:
        The plan of the adapted model.

    Raises:
        CheckpointError: The adapter is missing, damaged, or does not fit; the model is as it was
            before.
    """
    return load_source(model, read_source(Path(path), model), str(path), strict_base)


def load_source(model: nn.Module, adapter: Source, source: str, strict_base: bool) -> Plan:
    """The second half of `load_adapter`: put what `read_source` gave into a model."""
    config, state, metadata = adapter
    record = injection_of(model)
    plan = inject_lora(model, config, initialize=finds_start_again(adapter))
    was_merged = record is not None and record.merged
    unmerge_lora(model)
    if finds_start_again(adapter):
        state = {**starts(adapter_state_dict(model)), **state}
    try:
        if metadata is None:
            state = without_copies(model, state, source)
            state = {**base_buffers(require_injection(model)), **state}
        elif strict_base:
            audit_metadata(model, metadata, source)
        load_adapter_state_dict(model, state, source)
    except CheckpointError:
        if record is None:
            remove_lora(model)
        elif was_merged:
            merge_lora(model, record.merged_into)
        raise
    return plan


def finds_start_again(adapter: Source) -> bool:
    """Whether factors have to be initialised before an adapter is loaded into them: PEFT does not
    save what PiSSA and OLoRA start from, but finds it again on the base.
    """
    config, _, metadata = adapter
    return keeps_start(config.init) and metadata is None


def read_source(path: Path, model: nn.Module) -> Source:
    """The first half of `load_adapter`: read an adapter from disk, without changing the model."""
    if path.is_dir() and not is_directory(path):
        return _read_peft(path, model)
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[METADATA_KEY]
    # Without adapted layers, by what trains itself.
    owners = [n.rpartition(".")[0].removesuffix(f".{CHILD}") for n in checkpoint["state_dict"]]
    prefix = _common_prefix(list(metadata["targets"]) or owners, model, path)
    state = {name.removeprefix(prefix): tensor for name, tensor in checkpoint["state_dict"].items()}
    targets = {name.removeprefix(prefix): target for name, target in metadata["targets"].items()}
    base = dict(metadata["base"])
    if base.get("quantization"):
        layers = [name.removeprefix(prefix) for name in base["quantization"]["layers"]]
        base["quantization"] = {**base["quantization"], "layers": layers}
    settings = LoRAConfig.from_dict(metadata["config"])
    return settings, state, {**metadata, "targets": targets, "base": base}


def _read_peft(path: Path, model: nn.Module) -> Source:
    values, tensors = read_peft_files(path)
    state = from_peft_tensors(tensors)
    config = from_peft_config(values, state, str(path))
    config, state = grouped_from_peft(modules_by_name(model), config, state, str(path))
    return config, state, None


def _common_prefix(layers: list[str], model: nn.Module, path: Path) -> str:
    """What the names of a checkpoint have in front of the model's own, for a model out of a
    LightningModule.
    """
    modules = modules_by_name(model)
    parts = layers[0].split(".")
    for depth in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:depth])
        if all(name.startswith(prefix) and name.removeprefix(prefix) in modules for name in layers):
            return prefix
    raise CheckpointError(
        f"{path} adapts layers that {type(model).__name__} does not have, for instance "
        f"{layers[0]!r}. Load it into the model that it was trained on."
    )
