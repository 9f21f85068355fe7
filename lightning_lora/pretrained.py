"""Hugging Face models whose weights stay on disk until it is known which process needs which part.

`pretrained_on_meta` builds the model with its parameters on the meta device (buffers, such as
rotary tables, are real) and remembers where each parameter lies in the safetensors files.
`fill_parameters` reads them: of a sharded model each process reads its own shards.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors
from lightning_lora.layers.tokens import TokenRows
from lightning_lora.names import clean_name
from lightning_lora.on_meta import model_on_meta
from lightning_lora.sharded import extent, is_sharded, local, shard_from, write
from lightning_lora.weight_files import open_weights, weight_places

_ATTRIBUTE = "_lightning_lora_stored"


@dataclass(frozen=True)
class StoredWeights:
    """Where the parameters of a model lie.

    Attributes:
        places: File and key for each parameter's name.
        seed: Seed of the parameters that are stored nowhere, a new head for instance.
    """

    places: Mapping[str, tuple[Path, str]]
    seed: int


def pretrained_on_meta(auto_class: Any, name_or_path: str, **options: Any) -> Any:
    """Build a pretrained model without reading its weights.

    Args:
        auto_class: A model class of `transformers`, or one of its ``AutoModel`` classes.
        name_or_path: A folder, or a name on the hub, with safetensors files.
        **options: ``dtype`` (a `torch.dtype`, or ``"auto"`` for that of the config),
            ``trust_remote_code``, ``attn_implementation``, and settings of the config.

    Returns:
        The model in training mode, parameters on the meta device.

    Raises:
        NotPlainlyStoredError: There are no safetensors files, or their tensors are not the model's
            parameters one by one. Use ``from_pretrained``.
        ConfigError: A tensor has another shape than the settings ask for.
    """
    from transformers import AutoConfig

    dtype = options.pop("dtype", "auto")
    build: dict[str, Any] = {
        key: options.pop(key)
        for key in ("trust_remote_code", "attn_implementation")
        if key in options
    }
    config = AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=build.get("trust_remote_code", False), **options
    )
    if dtype != "auto":
        build["dtype"] = dtype
    elif getattr(config, "dtype", None) is not None:
        build["dtype"] = config.dtype
    model = model_on_meta(auto_class, config, **build)
    _add_generation_config(model, name_or_path)
    places = weight_places(model, name_or_path)
    setattr(model, _ATTRIBUTE, StoredWeights(places, seed=torch.initial_seed() % 2**63))
    return model.train()


def missing_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that are stored nowhere and will be newly initialised."""
    stored = getattr(model, _ATTRIBUTE, None)
    if stored is None:
        return []
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and clean_name(name) not in stored.places
    )


@torch.no_grad()
def fill_parameters(model: nn.Module, device: torch.device) -> None:
    """Give the parameters on the meta device their values: stored weights are read, factors drawn,
    new heads initialised.

    Args:
        model: A module that holds models made by `pretrained_on_meta`. Where it is sharded, only
            this process's shards are read and kept; the values are the same with any number of
            processes.
        device: Where the parameters go.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    replaced: dict[int, nn.Parameter] = {}
    for prefix, part in list(model.named_modules()):
        stored = getattr(part, _ATTRIBUTE, None)
        if stored is not None:
            _fill(part, prefix, stored, device, replaced)
            delattr(part, _ATTRIBUTE)


def _fill(
    model: nn.Module,
    prefix: str,
    stored: StoredWeights,
    device: torch.device,
    replaced: dict[int, nn.Parameter],
) -> None:
    with ExitStack() as files:
        opened: dict[Path, Any] = {}
        for path, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                if id(parameter) not in replaced:
                    fresh = _materialised(parameter, device)
                    replaced[id(parameter)] = fresh
                    name = clean_name(f"{path}.{leaf}" if path else leaf)
                    if name in stored.places:
                        file, key = stored.places[name]
                        if file not in opened:
                            opened[file] = files.enter_context(open_weights(file))
                        _read(fresh, opened[file], key)
                    elif isinstance(module, TokenRows):
                        raise ConfigError(
                            "trainable_token_indices starts from rows of the embeddings, which are "
                            "not loaded yet: load the model whole in each process."
                        )
                    elif isinstance(module, LoRAFactors):
                        write(fresh, module.initial_value(leaf, tuple(parameter.shape)))
                    else:
                        seed = f"{stored.seed}:{prefix}:{name}"
                        write(fresh, _initialised(model, module, leaf, parameter, seed))
                module._parameters[leaf] = replaced[id(parameter)]


def _materialised(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if not is_sharded(parameter):
        empty = torch.empty_like(parameter, device=device)
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)
    part = torch.empty_like(local(parameter), device=device)
    sharded = shard_from(part, parameter)
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _read(parameter: Tensor, file: Any, key: str) -> None:
    part = local(parameter)
    if part.numel() == 0:
        return
    window = tuple(slice(start, stop) for start, stop in extent(parameter))
    stored = file.get_slice(key)
    part.copy_(stored[window] if window else file.get_tensor(key))


def _initialised(
    model: nn.Module, module: nn.Module, leaf: str, parameter: Tensor, seed: str
) -> Tensor:
    """What the model's own initialisation gives a parameter, the same in every process."""
    alone = copy.copy(module)
    alone._parameters = {
        name: None
        if value is None
        else nn.Parameter(torch.zeros(value.shape, dtype=value.dtype, device="cpu"), False)
        for name, value in module._parameters.items()
    }
    digest = hashlib.blake2b(seed.encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest, "big"))
        model._init_weights(alone)  # type: ignore[operator]
    value = alone._parameters[leaf]
    assert value is not None
    return value


def _add_generation_config(model: Any, name_or_path: str) -> None:
    if not getattr(model, "can_generate", lambda: False)():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    except OSError:
        return  # not every model has one
