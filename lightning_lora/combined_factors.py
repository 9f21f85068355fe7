"""The factors of an adapter that several adapters are combined into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.analysis import Decomposition, decompose, decompose_product
from lightning_lora.slices import Slices
from lightning_lora.task_arithmetic import combine


@dataclass(frozen=True)
class Share:
    """What one adapter adds to a layer.

    Attributes:
        A: Shape ``(r, in)``, or as the layer keeps it.
        B: Shape ``(out, r)``, likewise.
        weight: w.
        scaling: s.
    """

    A: Tensor
    B: Tensor
    weight: float
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.B.shape[1]


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        kind: ``"cat"``, or a kind of `lightning_lora.task_arithmetic`.
        svd: Whether the updates are combined in place of the factors, and approximated.
        rank: Rank of the approximation; by default the largest among the adapters'.
        density: As of `lightning_lora.task_arithmetic.combine`.
        sign: Likewise.
    """

    kind: str
    svd: bool
    rank: int | None
    density: float
    sign: str


def combined_factors(
    shares: Sequence[Share], slices: Slices | None, how: Combination
) -> tuple[Tensor, Tensor]:
    """A and B of a layer in the new adapter, whose scaling is 1.

    Args:
        shares: What each adapter adds; of one rank if the factors themselves are combined.
        slices: The parts of a fused projection that they adapt.
        how: How they are combined.
    """
    if how.kind != "cat" and not how.svd:
        roots = [math.sqrt(abs(share.weight * share.scaling)) for share in shares]
        signs = [math.copysign(1.0, share.weight * share.scaling) for share in shares]
        signed = [root * sign for root, sign in zip(roots, signs, strict=True)]
        A = combine(how.kind, [s.A for s in shares], signed, how.density, how.sign)
        B = combine(how.kind, [s.B for s in shares], roots, how.density, how.sign)
        return A, B
    if how.kind in ("cat", "linear"):
        stacked = [_by_part(s.A, s, slices) * (s.weight * s.scaling) for s in shares]
        A, B = torch.cat(stacked, dim=1).flatten(0, 1), torch.cat([s.B for s in shares], dim=1)
        if not how.svd:
            return A, B
        products = [
            decompose_product(down.flatten(1), up.flatten(1)) for down, up in _parts(A, B, slices)
        ]
        return _best(products, how.rank, shares, slices)
    each = [list(_parts(share.A, share.B, slices)) for share in shares]
    totals = []
    for own in zip(*each, strict=True):
        updates = [
            share.scaling * up.flatten(1) @ down.flatten(1)
            for share, (down, up) in zip(shares, own, strict=True)
        ]
        weights = [share.weight for share in shares]
        totals.append(decompose(combine(how.kind, updates, weights, how.density, how.sign)))
    return _best(totals, how.rank, shares, slices)


def _by_part(A: Tensor, share: Share, slices: Slices | None) -> Tensor:
    """A with a dimension of its parts in front (groups of a convolution, slices of a projection).

    Parts with inputs of their own lie beside one another, and are one here.
    """
    parts = 1 if slices is not None and slices.widths is not None else A.shape[0] // share.r
    return A.reshape(parts, share.r, *A.shape[1:])


def _parts(A: Tensor, B: Tensor, slices: Slices | None) -> Iterator[tuple[Tensor, Tensor]]:
    if slices is None:
        count = A.shape[0] // B.shape[1]
        yield from zip(A.chunk(count), B.chunk(count), strict=True)
    else:
        yield from slices.blocks(A, B).values()


def _best(
    parts: Sequence[Decomposition], rank: int | None, shares: Sequence[Share], slices: Slices | None
) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of each part, in the form and dtype of the shares'."""
    r = rank or max(share.r for share in shares)
    A, B = shares[0].A, shares[0].B
    beside = slices is not None and slices.widths is not None
    pairs = [_padded(part.top(r), r) for part in parts]
    down = torch.cat([down for down, _ in pairs], dim=1 if beside else 0).to(A.dtype)
    up = torch.cat([up for _, up in pairs]).to(B.dtype)
    return (
        down if beside else down.reshape(-1, *A.shape[1:]),
        up.reshape(B.shape[0], r, *B.shape[2:]),
    )


def _padded(found: Decomposition, r: int) -> tuple[Tensor, Tensor]:
    down, up = found.V.new_zeros(r, len(found.V)), found.U.new_zeros(len(found.U), r)
    kept = len(found.S)
    # As in PEFT the singular values are all in B.
    down[:kept], up[:, :kept] = found.V.t(), found.U * found.S
    return down, up
