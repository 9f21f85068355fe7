"""What an adapter has learned: section 7 of LoRA (arXiv:2106.09685) as pure functions on tensors.

The update of a weight is ``dW = s B A`` with A of shape ``(r, in)`` and B of shape ``(out, r)``, so
that everything is computed from the factors: no function makes a dW, and none decomposes more than
an r x r matrix of it. All results are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """A thin singular value decomposition ``M = U diag(S) V^T``, cut off at the numerical rank k.

    Attributes:
        U: Left singular vectors as columns, shape ``(out, k)``.
        S: Singular values from the largest on, shape ``(k,)``.
        V: Right singular vectors as columns, shape ``(in, k)``.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.S.norm())

    def top(self, count: int) -> Decomposition:
        """The first directions alone; all where there are fewer."""
        return Decomposition(self.U[:, :count], self.S[:count], self.V[:, :count])


def decompose_product(A: Tensor, B: Tensor, scaling: float = 1.0) -> Decomposition:
    """The decomposition of ``s B A``.

    With ``B = Q1 R1`` and ``A^T = Q2 R2`` it is that of ``s R1 R2^T``, an r x r matrix, between Q1
    and Q2.

    Args:
        A: Shape ``(r, in)``.
        B: Shape ``(out, r)``.
        scaling: The factor s.

    Example:
        >>> A, B = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0], [0.0], [0.0]])
        >>> decompose_product(A, B, scaling=2).S
        tensor([6.], dtype=torch.float64)
    """
    left, first = torch.linalg.qr(B.double())
    right, second = torch.linalg.qr(A.double().t())
    U, S, Vt = torch.linalg.svd(scaling * first @ second.t(), full_matrices=False)
    kept = _numerical_rank(S, max(B.shape[0], A.shape[1]))
    return Decomposition(left @ U[:, :kept], S[:kept], right @ Vt[:kept].t())


def decompose(matrix: Tensor) -> Decomposition:
    """The decomposition of a matrix of shape ``(out, in)``: of a factor, or of a base weight W."""
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = _numerical_rank(S, max(matrix.shape))
    return Decomposition(U[:, :kept], S[:kept], Vt[:kept].t())


def inner_product(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    """``<B1 A1, B2 A2>``, the sum of the products of their elements, as ``<B1^T B2, A1 A2^T>``.

    Args:
        A1: Shape ``(r1, in)``.
        B1: Shape ``(out, r1)``.
        A2: Shape ``(r2, in)``.
        B2: Shape ``(out, r2)``.
    """
    return float(((B1.double().t() @ B2.double()) * (A1.double() @ A2.double().t())).sum())


def random_directions(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span the column space of a Gaussian matrix, shape ``(size, count)``.

    They are uniformly distributed, as are the singular vectors of such a matrix, the paper's random
    baseline in Figure 4.

    Args:
        size: Dimension of the space.
        count: Number of directions, at most ``size``.
        generator: On the CPU.
    """
    gaussian = torch.randn(size, count, generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(gaussian)[0]
    return directions


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) for all i and j: how much of the span of the first i directions of one matrix lies
    in the span of the first j directions of another.

    ``phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j)`` (equation 4, and Figures 3 and 4): 1
    where the smaller span lies in the other, 0 where they are orthogonal.

    Args:
        first: Orthonormal columns, shape ``(n, k1)``, the most important first.
        second: Likewise, shape ``(n, k2)``.

    Returns:
        Shape ``(k1, k2)``; phi(i, j) is at ``[i - 1, j - 1]``.

    Example:
        >>> I = torch.eye(3)
        >>> subspace_similarity(I[:, :1], I[:, [1, 0]])
        tensor([[0., 1.]], dtype=torch.float64)
    """
    overlaps = (first.double().t() @ second.double()).square()
    sums = overlaps.cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1)[:, None]
    j = torch.arange(1, sums.shape[1] + 1)[None, :]
    return sums / torch.minimum(i, j)


def random_similarity(i: int, j: int, size: int) -> float:
    """The expectation of phi(i, j) for random directions: ``max(i, j) / size``.

    Each of the i j squared products of independent unit vectors is ``1 / size`` on average.

    Example:
        >>> random_similarity(8, 64, 384)
        0.16666666666666666
    """
    return max(i, j) / size


def projected_norm(weight: Tensor, U: Tensor, V: Tensor) -> float:
    """``||U^T W V||_F``, how much of W lies in given directions (section 7.3, Table 7; their V has
    directions as rows).

    Args:
        weight: W, shape ``(out, in)``.
        U: Orthonormal columns, shape ``(out, k)``.
        V: Orthonormal columns, shape ``(in, k)``.
    """
    return float((U.t() @ weight.double() @ V).norm())


@dataclass(frozen=True)
class AgainstBase:
    """dW against W on the first directions of either and of random ones (Table 7).

    Attributes:
        directions: How many directions were taken of each.
        weight_norm: ``||W||_F``.
        on_delta: ``||U^T W V||_F`` with the directions of dW.
        on_weight: The same with those of W.
        on_random: The same with random ones.
        amplification: ``||dW||_F`` on its first directions, divided by `on_delta` (appendix H.4);
            infinite where W has nothing there.
        random_amplification: The same norm divided by `on_random`.
    """

    directions: int
    weight_norm: float
    on_delta: float
    on_weight: float
    on_random: float
    amplification: float
    random_amplification: float


def against_base(
    delta: Decomposition, weight: Tensor, base: Decomposition, generator: torch.Generator
) -> AgainstBase:
    """Compare an update with the weight that it is added to.

    Args:
        delta: Of dW, or of its first directions (`Decomposition.top`).
        weight: W, shape ``(out, in)``.
        base: Of W.
        generator: Of the random directions.
    """
    count, rows = len(delta.S), weight.shape[0]
    on_delta = projected_norm(weight, delta.U, delta.V)
    on_random = projected_norm(
        weight,
        random_directions(rows, count, generator),
        random_directions(weight.shape[1], count, generator),
    )
    return AgainstBase(
        directions=count,
        weight_norm=base.norm,
        on_delta=on_delta,
        on_weight=base.top(count).norm,
        on_random=on_random,
        amplification=_ratio(delta.norm, on_delta),
        random_amplification=_ratio(delta.norm, on_random),
    )


def effective_rank(S: Tensor) -> float:
    """The exponential of the entropy of the singular values as shares of their sum (Roy and
    Vetterli, "The effective rank", EUSIPCO 2007); 0 of nothing.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    shares = S.double()[S > 0]
    if not len(shares):
        return 0.0
    shares = shares / shares.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(S: Tensor) -> float:
    """``||M||_F^2 / ||M||_2^2``, from the singular values, the largest first; 0 of nothing."""
    return float((S.double() / S[0]).square().sum()) if len(S) and S[0] > 0 else 0.0


def directions_for(S: Tensor, share: float) -> int:
    """How many directions hold that share of ``||M||_F^2``.

    Args:
        S: Singular values, the largest first.
        share: In ``(0, 1]``.
    """
    if not len(S):
        return 0
    held = S.double().square().cumsum(0)
    return min(len(S), int((held < share * held[-1]).sum()) + 1)


def _numerical_rank(S: Tensor, size: int) -> int:
    """Directions of smaller singular values are rounding errors."""
    if not len(S) or S[0] == 0:
        return 0
    return int((S[0] * size * torch.finfo(S.dtype).eps < S).sum())


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf
