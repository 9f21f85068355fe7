"""Which output rows of a fused projection have factors of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """The parts of a fused projection (W_q, W_k and W_v in one weight), and those that are adapted.

    The output rows are seen as ``groups`` blocks of the same make-up; within a block the parts
    follow one another. GPT-2 has one group, ``(("q", n), ("k", n), ("v", n))``; GPT-NeoX has a
    group for each head, with ``head_dim`` rows of each part.

    Each adapted part has a pair of factors of its own (`MergedLinear` of loralib; arXiv:2106.09685,
    section 4.2). They are stored as one A, shape ``(k * r, in)``, and one B, shape ``(rows, r)``,
    part after part, where k is the number of adapted parts and ``rows`` the sum of their rows.

    Projections with inputs of their own (`torch.nn.MultiheadAttention` with other widths of keys
    and values) are parts of no common weight; their A holds part beside part, shape ``(r, sum of
    widths)``.

    Args:
        parts: Name and rows in one group of each part, in the order of the weight.
        adapted: Names of the parts that are adapted, in the order of the weight.
        groups: Number of blocks.
        widths: Input width of each part where parts have inputs of their own.

    Example:
        >>> heads = Slices((("q", 2), ("k", 2), ("v", 2)), ("q", "v"), groups=4)
        >>> heads.out_rows, heads.shapes((3, 10), (24, 3))
        (24, ((6, 10), (16, 3)))
    """

    parts: tuple[tuple[str, int], ...]
    adapted: tuple[str, ...]
    groups: int = 1
    widths: tuple[int, ...] | None = None

    @property
    def out_rows(self) -> int:
        """Output rows of the whole projection."""
        return self.groups * sum(rows for _, rows in self.parts)

    def shapes(
        self, A_shape: Sequence[int], B_shape: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the stored factors, from those of factors for the whole projection."""
        r, *rest = A_shape
        rows = self.groups * sum(rows for name, rows in self.parts if name in self.adapted)
        columns = self.adapted_widths()
        if columns is not None:
            return (r, sum(columns)), (rows, *B_shape[1:])
        return (len(self.adapted) * r, *rest), (rows, *B_shape[1:])

    def adapted_widths(self) -> list[int] | None:
        """Input widths of the adapted parts where parts have inputs of their own."""
        if self.widths is None:
            return None
        widths = zip(self.parts, self.widths, strict=True)
        return [width for (name, _), width in widths if name in self.adapted]

    def blocks(self, A: Tensor, B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A ``(r, width)`` and B ``(rows, r)`` of each adapted part."""
        columns = self.adapted_widths()
        downs = A.chunk(len(self.adapted)) if columns is None else A.split(columns, 1)
        return dict(zip(self.adapted, zip(downs, self._rows(B), strict=True), strict=True))

    def _rows(self, B: Tensor) -> Sequence[Tensor]:
        """The rows of B that belong to each adapted part."""
        sizes = dict(self.parts)
        return B.split([self.groups * sizes[name] for name in self.adapted])

    def spread(self, B: Tensor) -> Tensor:
        """The B for the whole projection: ``spread(B) @ A`` is the update, zero in other rows.

        Args:
            B: The stored factor, shape ``(rows, r)``.

        Returns:
            Shape ``(out_rows, k * r)``; in the rows of the j-th adapted part, the columns ``j * r``
            to ``(j + 1) * r`` hold its factor, and all else is zero. Differentiable in B.
        """
        k, r = len(self.adapted), B.shape[1]
        factors = dict(zip(self.adapted, self._rows(B), strict=True))
        blocks = []
        for name, rows in self.parts:
            if name in factors:
                before = self.adapted.index(name)
                block = factors[name].reshape(self.groups, rows, r)
                blocks.append(F.pad(block, (before * r, (k - 1 - before) * r)))
            else:
                blocks.append(B.new_zeros(self.groups, rows, k * r))
        return torch.cat(blocks, dim=1).reshape(self.out_rows, k * r)
