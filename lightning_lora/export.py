"""What a fit leaves for other tools: the merged model, and the adapter beside it."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.files import nearest_existing, replacing_directory
from lightning_lora.injection import require_injection
from lightning_lora.interop import write_adapter
from lightning_lora.model_card import data_settings, training_settings
from lightning_lora.model_record import hugging_face_part
from lightning_lora.names import listed, modules_by_name
from lightning_lora.quantization import quantized_layers
from lightning_lora.state import adapter_state_dict
from lightning_lora.strategies import Replicated, write_tensors
from lightning_lora.tokenizer_files import tokenizer_of


def export_model(
    module: LightningModule,
    directory: Path,
    trainer: Trainer,
    sharding: Replicated,
    best: bool = False,
) -> dict[str, Path]:
    """Write ``merged`` and ``adapter`` below a folder.

    A Hugging Face model inside the LightningModule is written with ``save_pretrained``, together
    with the tokenizer found as ``tokenizer`` on the LightningModule or its data module; any other
    model as one safetensors file. Of a sharded model rank 0 writes one layer after the other; every
    rank has to call this.

    Args:
        module: The LightningModule that LoRA was injected into, merged or not.
        directory: The folder that holds both.
        trainer: The Trainer that has it.
        sharding: How the model lies over the processes.
        best: Whether the module holds the weights of the best checkpoint, not the last ones.

    Returns:
        The folders by what they hold; on rank 0. An adapter that PEFT cannot express is left out
        with a warning.
    """
    state = sharding.whole_state(module)
    part = _part_of(module)
    if not trainer.is_global_zero:
        if sharding.is_sharded:
            with _merged(module, sharding):
                deque(sharding.tensors(module), maxlen=0)
        return {}
    exported = {}
    try:
        exported["adapter"] = write_adapter(
            module, directory / "adapter", part or "", state, **_facts_of(module, trainer, best)
        )
    except CheckpointError as error:
        # At the end of a fit, one export that cannot be must not cost the other.
        rank_zero_warn(f"The adapter was not exported: {error}")
    exported["merged model"] = merged = directory / "merged"
    with _merged(module, sharding):
        tensors = _tensors_of_part(sharding.tensors(module), part) if sharding.is_sharded else None
        with _taking_all(tensors), replacing_directory(merged) as fresh:
            _write(module, part, tensors, fresh, trainer)
    return exported


def announce_export(module: LightningModule, sharding: Replicated, directory: Path) -> None:
    """Say before a fit what its export will need, where that is more than a layer at a time.

    Args:
        module: The LightningModule that LoRA was injected into.
        sharding: How the model lies over the processes.
        directory: The folder that is to hold the export.

    Raises:
        ConfigError: The base is quantized and sharded: packed shards are no model's files. Or the
            folder cannot be written, or holds files that are no earlier export's.
    """
    for name in ("adapter", "merged"):
        _check_folder(directory / name)
    if sharding.is_sharded and quantized_layers(module):
        raise ConfigError(
            "export_dir: a quantized base that is sharded is not written as a merged model. Leave "
            "export_dir out, and merge or export a checkpoint afterwards: lightning-lora merge, "
            "lightning-lora export."
        )
    part = _part_of(module)
    if part is None or not sharding.is_sharded:
        return
    model: Any = modules_by_name(module)[part]
    if is_stored_otherwise(model):
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        rank_zero_info(
            f"export_dir: the files of {type(model).__name__} join or split its parameters, so "
            "rank 0 will gather the whole merged model in its CPU memory when the fit ends: "
            f"{size:.1f} GB. Leave export_dir out if that does not fit, and merge a checkpoint "
            "elsewhere."
        )


def _check_folder(folder: Path) -> None:
    """Find out before a fit what its end would stumble over."""
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"export_dir: {there} {why}. Choose another folder.")
    foreign = sorted(p.name for p in folder.glob("*") if not _is_exported(p))
    if foreign:
        raise ConfigError(
            f"export_dir: {folder} holds what no export has written ({listed(foreign, limit=3)}), "
            "and an export replaces the whole folder. Choose another, or move that away."
        )


def _is_exported(path: Path) -> bool:
    suffixes = (".safetensors", ".json", ".md", ".jinja", ".model", ".py", ".bin")
    return path.suffix in suffixes or path.name in ("vocab.txt", "merges.txt")


def _write(
    module: LightningModule,
    part: str | None,
    tensors: Iterator[tuple[str, Tensor]] | None,
    folder: Path,
    trainer: Trainer,
) -> None:
    if part is None:
        if tensors is None:
            save_model(module, str(folder / "model.safetensors"))
        else:
            write_tensors(tensors, folder)
        return
    model: Any = modules_by_name(module)[part]
    with untied_config(model), without_progress_bar():
        if tensors is None:
            model.save_pretrained(folder)
        elif is_stored_otherwise(model):
            # Its files join or split parameters, which takes all of them at once.
            model.save_pretrained(folder, state_dict=dict(tensors))
        else:
            write_configs(model, folder)
            write_tensors(tensors, folder)
    tokenizer = tokenizer_of(module, getattr(trainer, "datamodule", None))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def is_stored_otherwise(model: Any) -> bool:
    """Whether the files of a Hugging Face model hold other tensors than its parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _facts_of(module: LightningModule, trainer: Trainer, best: bool) -> dict[str, Any]:
    """What the model card says of the fit."""
    data: Any = getattr(trainer, "datamodule", None)
    checkpoint: Any = trainer.checkpoint_callback
    score = getattr(checkpoint, "best_model_score", None)
    if best:
        scores = {} if score is None else {checkpoint.monitor: float(score)}
    else:
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
    return {
        "training": training_settings(dict(module.hparams)),
        "data": data_settings(
            {} if data is None else {"class": type(data).__name__, **data.hparams}
        ),
        "scores": scores,
        "position": {} if best else {"global_step": trainer.global_step},
    }


def only_renames(model: Any) -> bool:
    """Whether the files of a Hugging Face model hold its parameters one by one, perhaps under other
    names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return all(isinstance(each, WeightRenaming) for each in mapping)


def stored_names(model: Any, names: Iterable[str]) -> list[str]:
    """What ``save_pretrained`` calls parameters of a model that `only_renames`."""
    from transformers.core_model_loading import revert_weight_conversion

    found = []
    for name in names:
        found += revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return found


def write_configs(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the configs that ``save_pretrained`` would.

    Args:
        model: A Hugging Face model.
        folder: Where they go.
        dtype: What the config says of the weights' dtype; by default that of the first parameter.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = dtype or next(model.parameters()).dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _tensors_of_part(
    tensors: Iterator[tuple[str, Tensor]], part: str | None
) -> Iterator[tuple[str, Tensor]]:
    prefix = f"{part}." if part else ""
    for name, tensor in tensors:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


@contextmanager
def _taking_all(tensors: Iterator[Any] | None) -> Iterator[None]:
    """Take what is left of the tensors whatever happens: other ranks wait for it to be gathered."""
    try:
        yield
    finally:
        if tensors is not None:
            deque(tensors, maxlen=0)


def _part_of(module: nn.Module) -> str | None:
    return hugging_face_part(module, list(adapter_state_dict(module)))


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep `transformers` from drawing its progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _merged(module: nn.Module, sharding: Replicated) -> Iterator[None]:
    was_merged = require_injection(module).merged
    sharding.merge(module)
    try:
        yield
    finally:
        if not was_merged:
            sharding.unmerge(module)


@contextmanager
def untied_config(model: Any) -> Iterator[None]:
    """A head that a merge has untied must not be tied again when the export is loaded."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    # Models without embeddings of words raise where they are asked for them.
    head = model.get_output_embeddings() if tied else None
    if head is None or head.weight is model.get_input_embeddings().weight:
        yield
        return
    model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        model.config.tie_word_embeddings = True
