"""Hugging Face models whose weights stay on disk until it is known which process needs which part.

`pretrained_on_meta` builds the model with its parameters on the meta device (buffers, such as
rotary tables, are real) and remembers where each parameter lies in the safetensors files.
`fill_parameters` reads them: of a sharded model each process reads its own shards.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lora.base_weights import keys_by_file
from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors
from lightning_lora.layers.tokens import TokenRows
from lightning_lora.names import clean_name, listed, persistent_buffers
from lightning_lora.sharded import extent, is_sharded, local, shard_from, write

_ATTRIBUTE = "_lightning_lora_stored"
_OF_A_MODEL = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


@dataclass(frozen=True)
class StoredWeights:
    """Where the parameters of a model lie.

    Attributes:
        places: File and key for each parameter's name.
        seed: Seed of the parameters that are stored nowhere, a new head for instance.
    """

    places: Mapping[str, tuple[Path, str]]
    seed: int


class NotPlainlyStoredError(ConfigError):
    """The files hold the weights in a form that only the model's own loading understands."""


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


def model_on_meta(auto_class: Any, config: Any, **options: Any) -> Any:
    """Build a model from its config with its parameters on the meta device; buffers are real.

    Args:
        auto_class: A model class of `transformers`, or one of its ``AutoModel`` classes.
        config: Its config.
        **options: For the class's ``from_config``.
    """
    with _parameters_on_meta():
        from_config = getattr(auto_class, "from_config", None) or auto_class._from_config
        return from_config(config, **options)


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


class StoredTensors(Mapping[str, Tensor]):
    """The weights of a model as its files hold them, each read when it is asked for.

    Args:
        places: File and key for each parameter's name.
        files: Keeps the files open.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]], files: ExitStack) -> None:
        self._places, self._files = places, files
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        if file not in self._opened:
            self._opened[file] = self._files.enter_context(_open(file))
        tensor: Tensor = self._opened[file].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def stored_weights(model: nn.Module) -> Iterator[StoredTensors]:
    """The weights that the Hugging Face models inside a module were loaded from.

    Args:
        model: Its models may have been quantized on loading.

    Raises:
        ConfigError: There is no such model, its files are not to be had, or they are quantized
            themselves.
    """
    places: dict[str, tuple[Path, str]] = {}
    outer = [(n, m) for n, m in model.named_modules() if hasattr(m, "_from_config")]
    outer = [
        (n, m)
        for n, m in outer
        if not any(n.startswith(f"{o}.") or (not o and n) for o, _ in outer)
    ]
    for prefix, part in outer:
        for name, place in _places_of_loaded(part).items():
            places[clean_name(f"{prefix}.{name}" if prefix else name)] = place
    if not places:
        raise ConfigError(
            "The original weights are needed, and there is no Hugging Face model that was loaded "
            "from safetensors files. Use merge_base='dequantized', or another init."
        )
    with ExitStack() as files:
        yield StoredTensors(places, files)


def _places_of_loaded(model: Any) -> dict[str, tuple[Path, str]]:
    config = copy.deepcopy(model.config)
    name = config._name_or_path
    try:
        folder = model_folder(name)
        written = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The original weights are needed, and the files of the base model {name!r} cannot be "
            f"read ({error}). Put them in their place, or use merge_base='dequantized'."
        ) from error
    if "quantization_config" in written:
        raise ConfigError(
            f"The original weights are needed, and the files of {name!r} hold quantized ones. "
            "Use merge_base='dequantized', or another init."
        )
    config.__dict__.pop("quantization_config", None)
    skeleton = model_on_meta(type(model), config)
    return weight_places(skeleton, name)


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
                            opened[file] = files.enter_context(_open(file))
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


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except Exception as error:  # safetensors and the system raise many kinds
        raise ConfigError(
            f"The weights in {file} could not be read on this process ({error}). Every node needs "
            "the base model's files at this path; copy them there or download them again."
        ) from error
    with handle as opened:
        yield opened


def weight_places(
    model: Any, name_or_path: str, without: Collection[str] = ()
) -> dict[str, tuple[Path, str]]:
    """File and key of each parameter of a model; persistent buffers are filled.

    Args:
        model: A Hugging Face model, also on the meta device.
        name_or_path: A folder, or a name on the hub.
        without: Names of parameters that come from elsewhere.

    Raises:
        NotPlainlyStoredError: There are no safetensors files, or their tensors are not the model's
            parameters one by one.
        ConfigError: A tensor has another shape, or a file is missing or damaged.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    folder = model_folder(name_or_path)
    keys_of = keys_by_file(folder)
    if not keys_of:
        raise NotPlainlyStoredError(f"{folder} holds no model.safetensors.")
    expected = dict(model.named_parameters(remove_duplicate=False))
    buffers = persistent_buffers(model)
    known = {**expected, **buffers}
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if not isinstance(each, WeightRenaming)]
    places: dict[str, tuple[Path, str]] = {}
    unused = []
    for file, keys in keys_of.items():
        with _open(file) as opened:
            for key in keys:
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, known
                )
                if converted is not None and name in expected:
                    raise NotPlainlyStoredError(
                        f"{name_or_path} stores {name} in pieces that are joined when it is loaded."
                    )
                if name in buffers:
                    buffers[name].copy_(opened.get_tensor(key))
                if name not in expected or name in without:
                    unused.append(key)
                    continue
                shape = tuple(opened.get_slice(key).get_shape())
                if shape != tuple(expected[name].shape):
                    raise ConfigError(
                        f"{name_or_path} holds {name} as {shape}, and the settings ask for "
                        f"{tuple(expected[name].shape)}: its head was trained on another number of "
                        "classes. Start from the base model, or set the same class names."
                    )
                places[name] = (file, key)
    # Parameters that share their storage have one entry among them.
    for names in _tied(model):
        found = next((name for name in names if name in places), None)
        if found is not None:
            places.update(dict.fromkeys(names, places[found]))
    if not places and set(expected) - set(without):
        raise NotPlainlyStoredError(
            f"The files of {name_or_path} hold none of the model's parameters (they hold "
            f"{listed(unused, limit=3)})."
        )
    return places


def _tied(model: nn.Module) -> list[list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def model_folder(name_or_path: str) -> Path:
    """The folder of a model; from the hub where it is none, with its tokenizer."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, allow_patterns=_OF_A_MODEL))


def _add_generation_config(model: Any, name_or_path: str) -> None:
    if not getattr(model, "can_generate", lambda: False)():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    except OSError:
        return  # not every model has one


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters begin as `torch.empty`; buffers as computed values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
