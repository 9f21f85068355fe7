"""A base on disk beside its model on the meta device: names, dtypes, values, fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.fingerprint import fingerprint
from lightning_lora.names import persistent_buffers
from lightning_lora.skeleton import Skeleton
from lightning_lora.state import trained_shapes
from lightning_lora.weight_files import StoredTensors

# What belongs to a model beside its weights and configs.
_SIDE_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "*.jinja", "*preprocessor_config.json", "processor_config.json"),
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def side_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to its tokenizer or other preprocessing."""
    found = {file for pattern in _SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def base_parameters(skeleton: Skeleton) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters, each once, by its own names."""
    for name, parameter in skeleton.model.named_parameters():
        if name in skeleton.names:
            yield name, parameter


def base_tensors(skeleton: Skeleton) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by the model's own names."""
    yield from base_parameters(skeleton)
    yield from persistent_buffers(skeleton.model).items()


def merged_dtypes(
    skeleton: Skeleton,
    state: Mapping[str, Tensor],
    places: Mapping[str, tuple[Path, str]],
    wanted: torch.dtype | None,
) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """What each tensor is merged in, and what it is written in; under all names that it has.

    Args:
        skeleton: The model.
        state: The adapter's tensors.
        places: File and key of each parameter of the base.
        wanted: Dtype of the result where it was asked for.
    """
    found: dict[int, tuple[torch.dtype, torch.dtype]] = {}
    names = {}
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        if name not in skeleton.names:
            continue
        if id(parameter) not in found:
            fitted = skeleton.dtypes.get(name, skeleton.dtype)
            own = state.get(skeleton.prefix + name)
            if fitted is None and own is not None:
                fitted = own.dtype
            elif fitted is None:
                fitted = _stored_dtype(*places[name])
                if wanted is not None:
                    # Rounded once, at the end.
                    fitted = torch.promote_types(fitted, wanted)
            found[id(parameter)] = fitted, wanted or fitted
        names[name] = found[id(parameter)]
    for name, buffer in persistent_buffers(skeleton.model).items():
        names[name] = buffer.dtype, buffer.dtype
    return names


def read_as(places: Mapping[str, tuple[Path, str]], name: str, dtype: torch.dtype) -> Tensor:
    """A weight of the base in another dtype; its file is closed again."""
    with ExitStack() as files:
        # A copy in any case, so that the pages of mapped files do not pile up.
        return StoredTensors(places, files)[name].to(dtype, copy=True)


def fingerprint_of_files(
    skeleton: Skeleton,
    read: Callable[[str], Tensor],
    left_out: Collection[str] = (),
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> str:
    """The fingerprint of a frozen base whose weights are read one after the other.

    Args:
        skeleton: The model.
        read: Gives a weight by the model's own name of it.
        left_out: Names of weights that do not count.
        progress: Called with how many weights are done, of how many, and the next one's name.
    """
    trained = {name.removeprefix(skeleton.prefix) for name in trained_shapes(skeleton.injection)}
    frozen = [
        name
        for name, _ in base_parameters(skeleton)
        if name not in trained and name not in left_out
    ]

    def values() -> Iterator[Tensor]:
        for number, name in enumerate(frozen):
            progress(number, len(frozen), name)
            yield read(name)

    return fingerprint(values())


def _stored_dtype(file: Path, key: str) -> torch.dtype:
    with safe_open(file, "pt") as opened:
        return _DTYPES.get(opened.get_slice(key).get_dtype(), torch.float32)
