"""The factors of an adapter that several adapters are combined into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.analysis import decompose_product
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
        pairs = [
            _best_of_product(down, up, _rank(shares, how)) for down, up in _parts(A, B, slices)
        ]
        return _joined(pairs, A, B, slices)
    each = [list(_parts(share.A, share.B, slices)) for share in shares]
    pairs = []
    for own in zip(*each, strict=True):
        updates = [
            share.scaling * up.flatten(1) @ down.flatten(1)
            for share, (down, up) in zip(shares, own, strict=True)
        ]
        weights = [share.weight for share in shares]
        total = combine(how.kind, updates, weights, how.density, how.sign)
        pairs.append(_best_of(total, _rank(shares, how)))
    return _joined(pairs, shares[0].A, shares[0].B, slices)


def _rank(shares: Sequence[Share], how: Combination) -> int:
    return how.rank or max(share.r for share in shares)


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
    elif slices.widths is not None:
        yield from slices.blocks(A, B).values()
    else:
        sizes = dict(slices.parts)
        rows = [slices.groups * sizes[name] for name in slices.adapted]
        yield from zip(A.chunk(len(rows)), B.split(rows), strict=True)


def _joined(
    pairs: Sequence[tuple[Tensor, Tensor]], A: Tensor, B: Tensor, slices: Slices | None
) -> tuple[Tensor, Tensor]:
    """The factors of the parts in the form and dtype of other factors of the layer."""
    beside = slices is not None and slices.widths is not None
    down = torch.cat([down for down, _ in pairs], dim=1 if beside else 0)
    up = torch.cat([up for _, up in pairs])
    return (
        down.to(A.dtype) if beside else down.to(A.dtype).reshape(-1, *A.shape[1:]),
        up.to(B.dtype).reshape(B.shape[0], up.shape[1], *B.shape[2:]),
    )


def _best_of_product(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    found = decompose_product(A.flatten(1), B.flatten(1)).top(r)
    return _padded(found.U, found.S, found.V.t(), r)


def _best_of(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _padded(U[:, :r], S[:r], Vh[:r], r)


def _padded(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    down, up = Vh.new_zeros(r, Vh.shape[1]), U.new_zeros(U.shape[0], r)
    kept = len(S)
    # As in PEFT the singular values are all in B.
    down[:kept], up[:, :kept] = Vh, U * S
    return down, up
