"""What is in an adapter, and what is different in another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapters import Adapter, Factors, notes_of
from lightning_lora.analysis import (
    Decomposition,
    decompose_product,
    inner_product,
    subspace_similarity,
)
from lightning_lora.names import corresponding
from lightning_lora.spectra import spectrum_of


def inspect_adapter(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter in primitives.

    Returns:
        Where it lies and its size in bytes, the settings, what is said about the base, epoch and
        step, the numbers of parameters, the numbers of each layer's update (`Spectrum`, those that
        moved most first, by the root mean square of the update's elements), the other trained
        tensors (magnitudes among them), the layers whose update is no product of two matrices, and
        what else a reader has to know.
    """
    layers = [
        spectrum_of(name, factors, _delta(factors)).numbers()
        for name, factors in adapter.factors.items()
    ]
    others = _others(adapter)
    factors = [t for name, t in adapter.state.items() if _is_of_lora(name)]
    return {
        "path": str(adapter.path),
        "form": adapter.form,
        "bytes": _size_of(adapter.path),
        "base": dict(adapter.base),
        **adapter.position,
        "settings": adapter.config.to_dict(),
        "parameters": {
            "factors": sum(t.numel() for t in factors),
            "trained_whole": sum(t.numel() for n, t in others.items() if not _is_of_lora(n)),
        },
        "layers": sorted(layers, key=lambda row: -row["delta_rms"]),
        "other_tensors": [
            {"name": name, "shape": list(tensor.shape), "norm": _norm(tensor)}
            for name, tensor in others.items()
        ],
        "left_out": dict(adapter.left_out),
        "notes": notes_of(adapter),
    }


def diff_adapters(first: Adapter, second: Adapter) -> dict[str, Any]:
    """Compare two adapters.

    Returns:
        In primitives: whether all trained tensors and scalings are equal; whether the bases are
        (``None`` if a fingerprint is not known); settings with other values; the layers that one of
        them alone adapts; of each common layer the norms of the updates, that of their difference,
        their cosine, and phi(1, 1) of the directions they read from; other trained tensors
        likewise; and what else a reader has to know.
    """
    prints = [adapter.base.get("fingerprint") for adapter in (first, second)]
    ours, theirs = first.config.to_dict(), second.config.to_dict()
    names = corresponding(second.factors, first.factors)
    mine = {names.get(name, name): factors for name, factors in second.factors.items()}
    common = [name for name in first.factors if name in mine]
    layers = [_layer_difference(name, first.factors[name], mine[name]) for name in common]
    only_first = [name for name in first.factors if name not in mine]
    only_second = [name for name in mine if name not in first.factors]
    others = _other_differences(_others(first), _others(second))
    same = not (only_first or only_second) and not any(
        row["difference_norm"] != 0 for row in [*layers, *others]
    )
    return {
        "first": str(first.path),
        "second": str(second.path),
        "identical": same,
        "same_base": None if None in prints else prints[0] == prints[1],
        "bases": [dict(first.base), dict(second.base)],
        "positions": [dict(first.position), dict(second.position)],
        "settings": {key: [ours[key], theirs[key]] for key in ours if ours[key] != theirs[key]},
        "only_first": only_first,
        "only_second": only_second,
        "layers": sorted(layers, key=lambda row: -(row["relative_difference"] or 0)),
        "other_tensors": others,
        "notes": list(dict.fromkeys([*notes_of(first), *notes_of(second)])),
    }


def _layer_difference(layer: str, first: Factors, second: Factors) -> dict[str, Any]:
    sizes = [[f.B.shape[0], f.A.shape[1]] for f in (first, second)]
    row: dict[str, Any] = {
        "layer": layer,
        "r": [first.A.shape[0], second.A.shape[0]],
        "scaling": [first.scaling, second.scaling],
        "sizes": sizes,
    }
    one, other = _delta(first), _delta(second)
    row["delta_norm"] = [one.norm, other.norm]
    comparable = sizes[0] == sizes[1]
    difference = _difference(first, second) if comparable else None
    largest = max(one.norm, other.norm)
    row["difference_norm"] = difference
    row["relative_difference"] = (
        None if difference is None else difference / largest if largest else 0.0
    )
    moved = comparable and len(one.S) > 0 and len(other.S) > 0
    row["cosine"] = row["phi_1_1"] = None
    if moved:
        inner = inner_product(first.A, first.B, second.A, second.B)
        row["cosine"] = first.scaling * second.scaling * inner / (one.norm * other.norm)
        row["phi_1_1"] = float(subspace_similarity(one.V[:, :1], other.V[:, :1]))
    return row


def _difference(first: Factors, second: Factors) -> float:
    same = torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
    if same and first.scaling == second.scaling:
        # Of equal ones a rounding error would be left.
        return 0.0
    B = torch.cat([first.B.double() * first.scaling, second.B.double() * -second.scaling], dim=1)
    return decompose_product(torch.cat([first.A.double(), second.A.double()]), B).norm


def _other_differences(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    names = corresponding(second, first)
    mine = {names.get(name, name): tensor for name, tensor in second.items()}
    rows = []
    for name in dict.fromkeys([*first, *mine]):
        one, other = first.get(name), mine.get(name)
        difference = None
        if one is not None and other is not None and one.shape == other.shape:
            difference = _norm(one.double() - other.double())
        norms = [None if tensor is None else _norm(tensor) for tensor in (one, other)]
        rows.append({"name": name, "norm": norms, "difference_norm": difference})
    return rows


def _delta(factors: Factors) -> Decomposition:
    return decompose_product(factors.A, factors.B, factors.scaling)


def _others(adapter: Adapter) -> dict[str, Tensor]:
    """The trained tensors that are no factors of what can be analysed."""
    analysed = {name.partition("[")[0] for name in adapter.factors}
    return {
        name: tensor
        for name, tensor in adapter.state.items()
        if not (_is_factor(name) and name[: -len(".lora.A")] in analysed)
    }


def _is_factor(name: str) -> bool:
    return name.endswith((".lora.A", ".lora.B"))


def _is_of_lora(name: str) -> bool:
    return _is_factor(name) or name.endswith(".lora.magnitude")


def _norm(tensor: Tensor) -> float | None:
    """The Frobenius norm; ``None`` if it is no finite number, for which JSON has no word."""
    norm = float(tensor.double().norm())
    return norm if math.isfinite(norm) else None


def _size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
