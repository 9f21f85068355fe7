"""Adapters as other code keeps them: factors beside plain tensors in one file, by other names.

Two kinds of names are known, with A ``[r, in]`` and B ``[out, r]`` in both: ``lora_A`` and
``lora_B`` (loralib), ``lora_matrix_A`` and ``lora_matrix_B`` (the article "Implementing LoRA from
Scratch").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_lora.checkpoints import explain_unreadable
from lightning_lora.errors import CheckpointError
from lightning_lora.names import listed

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?:matrix_)?(?P<leaf>[AB])(?:\.weight)?")
_NUMBER = re.compile(r"(?:(?P<layer>.+)\.)?(?:lora_)?(?P<what>alpha|scaling)")
_STATES = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class ForeignAdapter:
    """What such a file holds, by the file's own names.

    Attributes:
        A: The factors A by layer.
        B: The factors B by layer.
        scaling: The factor s in front of ``B @ A`` by layer.
        plain: The other tensors.
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    scaling: Mapping[str, float]
    plain: Mapping[str, Tensor]

    @property
    def r(self) -> dict[str, int]:
        """Rank by layer."""
        return {layer: B.shape[1] for layer, B in self.B.items()}


def read_foreign(
    path: Path,
    alpha: float | None = None,
    scaling: float | None = None,
    skip: Collection[str] = (),
) -> ForeignAdapter:
    """Read a file of factors and plain tensors; nothing in it is executed.

    Args:
        path: A safetensors file, or one that ``torch.save`` wrote: a state dict, or a mapping with
            one as ``state_dict``, ``model_state_dict`` or ``model``.
        alpha: Numerator of the scaling ``alpha / r``.
        scaling: The scaling itself, in the place of alpha. Without either, numbers called
            ``alpha``, ``lora_alpha``, ``scaling`` or ``lora_scaling``, of a layer or of the file,
            say it.
        skip: Beginnings of names of tensors that are left out.

    Raises:
        CheckpointError: The file is missing, damaged, holds no factors, or half a pair, or does not
            say how they are scaled.
    """
    content = _read(path)
    numbers = _numbers(content)
    tensors = next((content[k] for k in _STATES if isinstance(content.get(k), Mapping)), content)
    numbers |= _numbers(tensors)
    factors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    plain = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name.startswith(tuple(skip)):
            continue
        match = _FACTOR.fullmatch(name)
        if match is not None:
            factors[match["leaf"]][match["layer"]] = tensor
        elif _NUMBER.fullmatch(name) is None:
            plain[name] = tensor
    A, B = factors["A"], factors["B"]
    if not A and not B:
        raise CheckpointError(
            f"{path} holds no LoRA factors called lora_A and lora_B, or lora_matrix_A and "
            f"lora_matrix_B. It holds: {listed(list(plain), limit=3) or 'no tensors'}."
        )
    halves = sorted(set(A) ^ set(B))
    if halves:
        raise CheckpointError(f"{path} holds one factor of two for {listed(halves, limit=3)}.")
    for layer in B:
        A[layer], B[layer] = _upright(A[layer], B[layer])
    found = {layer: _scaling(layer, B[layer].shape[1], alpha, scaling, numbers) for layer in B}
    unknown = [layer for layer, value in found.items() if value is None]
    if unknown:
        raise CheckpointError(
            f"{path} does not say how the update of {unknown[0]} is scaled. Give --alpha (the "
            "scaling is alpha / r) or --scaling."
        )
    return ForeignAdapter(A, B, {k: v for k, v in found.items() if v is not None}, plain)


def common_rank(ranks: Mapping[str, int]) -> int:
    """The rank that most layers have."""
    return Counter(ranks.values()).most_common(1)[0][0]


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} could not be read: it is damaged ({error}).") from error
    with explain_unreadable(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no tensors by name, but a {type(content).__name__}.")
    return content


def _upright(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with A ``[r, in]`` and B ``[out, r]``, also where both were kept transposed."""
    if A.ndim == B.ndim == 2 and A.shape[1] == B.shape[0] and A.shape[1] < A.shape[0]:
        return A.t().contiguous(), B.t().contiguous()
    return A, B


def _numbers(content: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The alphas and scalings of layers, and of all as those of the layer ``""``."""
    found = {}
    for name, value in content.items():
        match = _NUMBER.fullmatch(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if match is not None and (is_number or (isinstance(value, Tensor) and value.numel() == 1)):
            found[match["layer"] or "", match["what"]] = float(value)
    return found


def _scaling(
    layer: str,
    r: int,
    alpha: float | None,
    scaling: float | None,
    numbers: Mapping[tuple[str, str], float],
) -> float | None:
    if scaling is not None:
        return scaling
    if alpha is not None:
        return alpha / r
    for owner in (layer, ""):
        if (owner, "scaling") in numbers:
            return numbers[owner, "scaling"]
        if (owner, "alpha") in numbers:
            return numbers[owner, "alpha"] / r
    return None
