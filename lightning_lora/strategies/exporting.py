"""Writing a sharded model out as whole tensors, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# A file is closed at the end of the layer with which it reaches this size.
FILE_BYTES = 2**30
INDEX_FILE = "model.safetensors.index.json"


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, file_bytes: int | None = None
) -> None:
    """Write tensors as they come to safetensors files, with the index that `transformers` reads
    where there are several.

    No more than a file's or one layer's tensors are held at a time.

    Args:
        tensors: Names and whole tensors on the CPU; those of a layer come together.
        folder: An empty folder.
        file_bytes: The most bytes of tensors in a file, but for single tensors above it. By default
            files end with the layer that takes them to `FILE_BYTES`.
    """
    files: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size, total, layer = 0, 0, ""

    def close() -> None:
        path = folder / f"part-{len(files)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        files.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        if file_bytes is None:
            full = size >= FILE_BYTES and layer_of(name) != layer
        else:
            full = bool(held) and size + tensor.nbytes > file_bytes
        if full:
            close()
            size = 0
        layer = layer_of(name)
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    places = {}
    for number, (path, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        places.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def layer_of(name: str) -> str:
    """The numbered layer that a parameter belongs to, or an empty string.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', '')
    """
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
