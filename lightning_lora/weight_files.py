"""Where the weights of a Hugging Face model lie in its safetensors files."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.base_weights import keys_by_file
from lightning_lora.errors import ConfigError
from lightning_lora.names import clean_name, listed, persistent_buffers
from lightning_lora.on_meta import model_on_meta

_OF_A_MODEL = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


class NotPlainlyStoredError(ConfigError):
    """The files hold the weights in a form that only the model's own loading understands."""


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
            self._opened[file] = self._files.enter_context(open_weights(file))
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
        with open_weights(file) as opened:
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


def model_folder(name_or_path: str) -> Path:
    """The folder of a model; from the hub where it is none, with its tokenizer."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, allow_patterns=_OF_A_MODEL))


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


def _tied(model: nn.Module) -> list[list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, open.

    Raises:
        ConfigError: It is missing or damaged.
    """
    try:
        handle = safe_open(file, framework="pt")
    except Exception as error:  # safetensors and the system raise many kinds
        raise ConfigError(
            f"The weights in {file} could not be read on this process ({error}). Every node needs "
            "the base model's files at this path; copy them there or download them again."
        ) from error
    with handle as opened:
        yield opened
