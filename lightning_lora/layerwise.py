"""A merge from disk to disk, layer by layer: what it consists of, and the tensors it gives.

A layer's weights are read, its update is added by the very functions that merge a live model, and
the result goes to the file that is being filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base_on_disk import base_parameters, base_tensors, read_as
from lightning_lora.export import stored_names, untied_config, write_configs
from lightning_lora.layers import LoRALayer
from lightning_lora.merging import merge_layer, shared_parameters
from lightning_lora.names import modules_by_name
from lightning_lora.plan import Target
from lightning_lora.skeleton import Skeleton
from lightning_lora.stored import StoredAdapter
from lightning_lora.strategies import write_tensors


@dataclass
class Merge:
    """A merge that was prepared: everything was checked and nothing is written.

    Attributes:
        adapter: The adapter.
        folder: The base's folder.
        skeleton: The model without weights; tied weights that the merge parts are apart.
        places: File and key of each parameter of the base.
        dtype: Dtype of the result where it was asked for.
        layers: How many layers are merged.
        replaced: How many tensors of the base the adapter's own take the place of.
        live: The loaded model, of an architecture that is not merged layer by layer.
        dtypes: What each tensor of the base is merged in, and what it is written in.
        size: Bytes of the result's tensors.
        check: What the comparison of the base's fingerprint has come to.
        notes: What else is worth knowing.
    """

    adapter: StoredAdapter
    folder: Path
    skeleton: Skeleton
    places: dict[str, tuple[Path, str]]
    dtype: torch.dtype | None
    layers: int
    replaced: int
    live: nn.Module | None = None
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    size: int = 0
    check: str = ""
    notes: tuple[str, ...] = ()


def write_layers(
    merge: Merge, folder: Path, shard: int, progress: Callable[[int, int, str], None]
) -> None:
    """Write the merged model's tensors and configs.

    Args:
        merge: What was prepared.
        folder: An empty folder.
        shard: The most bytes of a file.
        progress: Called with how many tensors are done, of how many, and the next one's name.
    """
    model = merge.skeleton.model
    write_tensors(_values(merge, progress), folder, shard)
    _add_generation_config(model, merge.folder)
    with untied_config(model):
        first, _ = next(base_parameters(merge.skeleton))
        write_configs(model, folder, merge.dtypes[first][1])


def _add_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def untie(skeleton: Skeleton) -> None:
    """Part the weights that a merge changes in one of the modules that share them."""
    record, modules = skeleton.injection, modules_by_name(skeleton.root)
    shared = shared_parameters(skeleton.root, record)
    for target in record.plan.targets:
        module = modules[target.name]
        for leaf in target.weights:
            weight = module._parameters[leaf]
            assert weight is not None
            if target.tied_to is not None:
                module._parameters[leaf] = modules[target.tied_to]._parameters[leaf]
            elif id(weight) in shared:
                module._parameters[leaf] = nn.Parameter(weight.detach().clone(), False)


def _values(
    merge: Merge, progress: Callable[[int, int, str], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the merged model, in the order of its parameters."""
    skeleton, state = merge.skeleton, merge.adapter.state
    modules = modules_by_name(skeleton.root)
    adapted: dict[int, tuple[Target, str]] = {
        id(modules[target.name]._parameters[leaf]): (target, leaf)
        for target in skeleton.injection.plan.targets
        if target.tied_to is None
        for leaf in target.weights
    }
    tensors = list(base_tensors(skeleton))
    merged: dict[tuple[str, str], Tensor] = {}
    for number, (name, tensor) in enumerate(tensors):
        progress(number, len(tensors), name)
        own = state.get(skeleton.prefix + name)
        if own is not None:
            value = own
        elif id(tensor) in adapted:
            target, leaf = adapted[id(tensor)]
            if (target.name, leaf) not in merged:
                merged |= _merged_layer(merge, target, modules[target.name])
            value = merged.pop((target.name, leaf))
        elif tensor.is_meta:
            value = read_base(merge, name)
        else:
            value = tensor
        (stored,) = stored_names(skeleton.model, [name])
        yield stored, value.to(merge.dtypes[name][1])


@torch.no_grad()
def _merged_layer(merge: Merge, target: Target, module: Any) -> dict[tuple[str, str], Tensor]:
    """The weights of an adapted layer with its update, by the layer's name and theirs."""
    assert isinstance(module, LoRALayer)
    skeleton, record = merge.skeleton, merge.skeleton.injection
    own = target.name.removeprefix(skeleton.prefix)
    kept, factors = dict(module._parameters), dict(module.lora._parameters)
    try:
        for leaf in target.weights:
            module._parameters[leaf] = nn.Parameter(read_base(merge, f"{own}.{leaf}"), False)
        for leaf in (leaf for leaf, factor in factors.items() if factor is not None):
            value = merge.adapter.state[f"{target.name}.lora.{leaf}"]
            module.lora._parameters[leaf] = nn.Parameter(value, False)
        merge_layer(module, target, record)
        return {(target.name, leaf): getattr(module, leaf).detach() for leaf in target.weights}
    finally:
        module._parameters.update(kept)
        module.lora._parameters.update(factors)
        record.base_weights.clear()


def read_base(merge: Merge, name: str) -> Tensor:
    """A weight of the base in the dtype that it is merged in."""
    return read_as(merge.places, name, merge.dtypes[name][0])
