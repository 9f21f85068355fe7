"""Factors that start from the principal part of the weight: PiSSA and OLoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.initialization.loftq import error_factors
from lightning_lora.layers import LoRAFactors, adapted_class
from lightning_lora.names import listed, modules_by_name
from lightning_lora.plan import Plan, Target
from lightning_lora.quantization import dequantized, is_pending, quantized_layers
from lightning_lora.sharded import is_sharded
from lightning_lora.slices import Slices


@torch.no_grad()
def initialize_from_weights(
    model: nn.Module, plan: Plan, factors: Mapping[str, LoRAFactors], init: str
) -> None:
    """Set the factors to the principal part of each weight, and keep it as what they start from.

    Args:
        model: The model; its weights stay as they are.
        plan: What is adapted.
        factors: The factors by the name of their target, with room for their start.
        init: ``"pissa"``, ``"pissa_niter_K"`` or ``"olora"``.

    Raises:
        ConfigError: A weight is a shard, or not there yet.
    """
    modules = modules_by_name(model)
    quantized = quantized_layers(model)
    targets = [target for target in plan.targets if target.tied_to is None]
    weights = {t.name: getattr(modules[t.name], t.weights[0]) for t in targets}
    absent = [
        name
        for name, weight in weights.items()
        if weight.is_meta or is_sharded(weight) or (name in quantized and is_pending(modules[name]))
    ]
    if absent:
        raise ConfigError(
            f"init={init!r} reads the whole weights when LoRA is injected, and those of "
            f"{listed(absent, limit=3)} are sharded already or not loaded yet. Load the model "
            "whole in each process, or use init='kaiming'."
        )
    for target in targets:
        module, lora = modules[target.name], factors[target.name]
        weight = weights[target.name]
        if target.name in quantized:
            weight = dequantized(module, torch.float32)
        weight = weight.detach().to(lora.A.dtype)
        pair = principal_factors(module, weight, target, init, str(lora.seed))
        for leaf, values in zip(("A", "B"), pair, strict=True):
            lora.start_from(leaf, values)


def principal_factors(
    module: nn.Module, weight: Tensor, target: Target, init: str, seed: str
) -> tuple[Tensor, Tensor]:
    """The factors of a layer that stand for the principal part of its weight.

    Args:
        module: The layer.
        weight: Its weight as the layer keeps it, float32.
        target: Its target.
        init: As for `initialize_from_weights`.
        seed: Of a randomized SVD.
    """
    W = _as_matrix(module, weight, target)
    pairs = [
        _principal(part, target, init, f"{seed}:{target.name}:{number}")
        for number, part in enumerate(_parts(W, target.slices))
    ]
    A, B = zip(*pairs, strict=True)
    return torch.cat(A), torch.cat(B)


def _principal(W: Tensor, target: Target, init: str, seed: str) -> tuple[Tensor, Tensor]:
    if init == "olora":
        return orthonormal_factors(W, target.r)
    if init == "pissa":
        return error_factors(W, target.r, target.scaling)
    digest = hashlib.blake2b(seed.encode(), digest_size=7).digest()
    with torch.random.fork_rng([W.device] if W.is_cuda else []):
        # The same sketch on every rank.
        torch.manual_seed(int.from_bytes(digest, "big"))
        return sketched_factors(W, target.r, target.scaling, int(init.rpartition("_")[-1]))


def sketched_factors(W: Tensor, r: int, scaling: float, niter: int) -> tuple[Tensor, Tensor]:
    """As `error_factors`, by the randomized SVD of Halko et al. (arXiv:0909.4061).

    Args:
        W: Shape ``(out, in)``, float32.
        r: Rank.
        scaling: The factor s, above 0.
        niter: Number of subspace iterations: more are slower and nearer to the exact one.

    Returns:
        A, shape ``(r, in)``, and B, shape ``(out, r)``, with ``s B A`` near to the best
        approximation of W of this rank.
    """
    rank = min(r, *W.shape)
    U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
    root = (S / scaling).sqrt()
    A, B = W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    A[:rank] = root[:, None] * V.t()
    B[:, :rank] = U * root
    return A, B


def orthonormal_factors(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R in ``W = Q R`` (OLoRA, arXiv:2406.01775, algorithm 1).

    Args:
        W: Shape ``(out, in)``, float32.
        r: Rank; where it exceeds that of the decomposition the rest of the factors is zero.

    Returns:
        A, shape ``(r, in)``, and B, shape ``(out, r)`` with orthonormal columns.

    Example:
        >>> A, B = orthonormal_factors(torch.eye(3), r=2)
        >>> torch.allclose(B @ A, torch.diag(torch.tensor([1.0, 1.0, 0.0])))
        True
    """
    Q, R = torch.linalg.qr(W)
    rank = min(r, Q.shape[1])
    A, B = W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    A[:rank], B[:, :rank] = R[:rank], Q[:, :rank]
    return A, B


def _as_matrix(module: nn.Module, weight: Tensor, target: Target) -> Tensor:
    """The weight as ``(out, in)``."""
    kind: Any = type(module)
    adapted: Any = adapted_class(kind) or kind
    W = weight.movedim(adapted.out_dim, 0)
    if target.slices is None and W.shape != (target.B_shape[0], target.A_shape[1]):
        raise ConfigError(
            f"The weight of {target.name!r} {tuple(weight.shape)} does not fit to its factors "
            f"{target.A_shape} and {target.B_shape}. Set out_dim of {adapted.__name__} to the "
            "dimension of the weight that the outputs lie along, or use init='kaiming'."
        )
    return W


def _parts(W: Tensor, slices: Slices | None) -> Iterator[Tensor]:
    """The rows of W that each pair of factors updates, in the order of the factors."""
    if slices is None:
        yield W
        return
    groups = W.reshape(slices.groups, -1, W.shape[1])
    blocks = groups.split([rows for _, rows in slices.parts], dim=1)
    for (name, _), block in zip(slices.parts, blocks, strict=True):
        if name in slices.adapted:
            yield block.reshape(-1, W.shape[1])
