"""Merging an adapter on disk into its base on disk, a layer at a time: no model is ever in memory.

The model is built on the meta device, which gives the names, the ties, the layers and the order of
the parameters. Everything is checked before anything is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lightning_lora.base_on_disk import (
    base_parameters,
    base_tensors,
    fingerprint_of_files,
    merged_dtypes,
)
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.export import only_renames
from lightning_lora.files import nearest_existing, replacing_directory
from lightning_lora.layerwise import Merge, read_base, untie, write_layers
from lightning_lora.merging import factors_are_finite
from lightning_lora.names import listed, modules_by_name
from lightning_lora.skeleton import Skeleton, build_skeleton
from lightning_lora.state import trained_shapes
from lightning_lora.stored import StoredAdapter, base_folder, read_stored_adapter
from lightning_lora.tokenizer_files import tokenizer_files
from lightning_lora.weight_files import NotPlainlyStoredError, weight_places
from lightning_lora.whole_merging import load_whole, save_whole

_UNKNOWN = "not checked: PEFT's format records no fingerprint of the base"
DEFAULT_SHARD = 5 * 10**9


def prepare_merge(
    checkpoint: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Merge:
    """Find the base of an adapter, and check that they belong together.

    The frozen weights are read once for the fingerprint, one after the other.

    Args:
        checkpoint: A Lightning checkpoint of `LoRACallback` or a folder in PEFT format.
        base: Folder or hub name of the base; by default what the adapter names.
        dtype: Dtype of the result; by default the one of the fit, or that of the base's files where
            the adapter does not know it.
        progress: Called with how many tensors are done, of how many, and the next one's name.

    Raises:
        CheckpointError: The adapter or the base is missing, damaged, or not for the other.
        ConfigError: A factor is not finite.
    """
    adapter = read_stored_adapter(checkpoint)
    _refuse_loftq(adapter)
    folder = base_folder(adapter, base)
    skeleton = build_skeleton(adapter, folder)
    adapter = skeleton.adapter
    record = skeleton.injection
    factors_are_finite(record, adapter.state)
    if not only_renames(skeleton.model):
        return _prepare_whole(adapter, folder, skeleton, dtype)
    try:
        own = {name.removeprefix(skeleton.prefix) for name in trained_shapes(record)}
        places = weight_places(skeleton.model, str(folder), without=own)
    except NotPlainlyStoredError as error:
        raise CheckpointError(f"{error} A merge needs safetensors files.") from error
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    _refuse_missing(skeleton, places, own, folder)
    _refuse_unplaced(skeleton, adapter)
    merge = Merge(
        adapter, folder, skeleton, places, dtype, len(record.plan.targets), len(record.plan.trained)
    )
    merge.dtypes = merged_dtypes(skeleton, adapter.state, places, dtype)
    merge.check = _check_base(merge, progress)
    untie(skeleton)
    merge.size = sum(
        tensor.numel() * merge.dtypes[name][1].itemsize for name, tensor in base_tensors(skeleton)
    )
    if adapter.base.get("quantization"):
        merge.notes = (
            f"The adapter was trained on the base in {adapter.base['quantization']['kind']}; it is "
            "merged into the weights that were quantized, so outputs differ by the error of the "
            "quantization.",
        )
    return merge


def _prepare_whole(
    adapter: StoredAdapter, folder: Path, skeleton: Skeleton, dtype: torch.dtype | None
) -> Merge:
    root, plan = load_whole(adapter, skeleton, folder, dtype), skeleton.injection.plan
    merge = Merge(adapter, folder, skeleton, {}, dtype, len(plan.targets), len(plan.trained), root)
    loaded = replace(skeleton, root=root, model=root.get_submodule(skeleton.part))
    tensors = dict(base_tensors(loaded))
    merge.dtypes = {name: (tensor.dtype, dtype or tensor.dtype) for name, tensor in tensors.items()}
    merge.size = sum(t.numel() * merge.dtypes[name][1].itemsize for name, t in tensors.items())
    merge.check = "the same" if adapter.base else _UNKNOWN
    merge.notes = (
        f"The files of {type(skeleton.model).__name__} join or split its parameters: the whole "
        "model is in memory.",
    )
    return merge


def write_merge(
    merge: Merge,
    output: str | Path,
    shard: int = DEFAULT_SHARD,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> list[Path]:
    """Write a prepared merge as a folder that ``from_pretrained`` loads.

    No more than the tensors of one file are held at a time, but for models that are loaded whole.

    Args:
        merge: From `prepare_merge`.
        output: The folder; replaced as a whole once the new one is complete.
        shard: The most bytes of a file.
        progress: As for `prepare_merge`.

    Returns:
        The files.

    Raises:
        CheckpointError: The folder cannot be written, or a weight cannot be read; nothing is left.
    """
    output = Path(output)
    free = shutil.disk_usage(nearest_existing(output)).free
    if free < merge.size:
        raise CheckpointError(
            f"{output} cannot be written: the merged model takes {merge.size / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free there."
        )
    try:
        with replacing_directory(output) as fresh:
            if merge.live is not None:
                save_whole(merge.live, merge.skeleton.part, fresh, shard, merge.dtype)
            else:
                write_layers(merge, fresh, shard, progress)
            with tokenizer_files(merge.folder, merge.adapter.metadata) as files:
                for file in files:
                    shutil.copyfile(file, fresh / file.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{output} cannot be written: {reason}.") from error
    return sorted(path for path in output.iterdir() if path.is_file())


def _refuse_loftq(adapter: StoredAdapter) -> None:
    if adapter.config.init == "loftq":
        raise CheckpointError(
            f"{adapter.path} was trained with init='loftq': its factors began as the error of the "
            "quantization, which merging into the original weights would add to them. Merge it in "
            "Python, into the dequantized base (load_lightning_module)."
        )


def _refuse_missing(
    skeleton: Skeleton, places: dict[str, tuple[Path, str]], own: set[str], folder: Path
) -> None:
    missing = [
        name
        for name, parameter in base_parameters(skeleton)
        if name not in places and name not in own
    ]
    if missing:
        raise CheckpointError(
            f"{folder} and the adapter hold no {listed(missing, limit=3)} of "
            f"{type(skeleton.model).__name__}. Give --base with the model that it was trained on; "
            "weights that were new and did not train are kept nowhere."
        )


def _refuse_unplaced(skeleton: Skeleton, adapter: StoredAdapter) -> None:
    """Nothing that was trained may be left out without a word."""
    modules = modules_by_name(skeleton.root)
    factors = {
        f"{target.name}.lora.{leaf}"
        for target in skeleton.injection.plan.targets
        for leaf, _ in modules[target.name].get_submodule("lora").named_parameters()
    }
    own = {skeleton.prefix + name for name, _ in base_tensors(skeleton)}
    unplaced = [name for name in adapter.state if name not in own | factors]
    if unplaced:
        way = "load_adapter, merge_lora" if adapter.peft else "load_lightning_module"
        raise CheckpointError(
            f"{adapter.path} holds what is not merged on disk: {listed(unplaced, limit=3)}. Merge "
            f"it in Python ({way})."
        )


def _check_base(merge: Merge, progress: Callable[[int, int, str], None]) -> str:
    """Compare the fingerprint of the base's files with that of the checkpoint.

    Raises:
        CheckpointError: They differ.
    """
    said, skeleton = merge.adapter.base, merge.skeleton
    wanted = said.get("fingerprint")
    if wanted is None:
        return _UNKNOWN
    quantization = said.get("quantization")
    left_out: set[str] = set()
    if quantization:
        wanted = quantization["rest"]
        left_out = {
            f"{name.removeprefix(skeleton.prefix)}.weight" for name in quantization["layers"]
        }
    found = fingerprint_of_files(skeleton, lambda name: read_base(merge, name), left_out, progress)
    if found != wanted:
        raise CheckpointError(
            f"{merge.adapter.path} was trained on another base than {merge.folder} (fingerprint "
            f"{str(wanted)[:12]} of {said['name_or_path']}, {said['parameters']:,} parameters). "
            "Give --base with the weights that it was trained on."
        )
    return "the same, what is not quantized in it" if quantization else "the same"


def merge_on_disk(
    checkpoint: str | Path, output: str | Path, base: str | Path | None = None, **options: Any
) -> list[Path]:
    """`prepare_merge` and `write_merge` in one."""
    return write_merge(prepare_merge(checkpoint, base, **options), output)
