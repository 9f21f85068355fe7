"""The principal components of vectors that arrive batch by batch.

Incremental PCA (Ross et al. 2008): the vectors themselves are not kept, and what several processes
have found is joined in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What is kept beyond the components that are asked for, against the loss of what only later batches
# bring out.
SPARE = 16


@dataclass
class Components:
    """The count, mean and leading components of vectors, to which more can be added.

    Attributes:
        keep: How many components are kept.
        count: How many vectors were seen.
        mean: Their mean, shape ``(in,)``.
        scaled: Right-singular vectors of the centred vectors, each times its singular value, shape
            ``(at most keep, in)``.
        scatter: The sum of all squared singular values, of those that were not kept too.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> found = Components(1)
        >>> for row in x:
        ...     found.add(row[None])
        >>> found.leading(1).abs()
        tensor([[1., 0.]])
    """

    keep: int
    count: int = 0
    mean: Tensor | None = None
    scaled: Tensor | None = None
    scatter: float = 0.0

    def add(self, vectors: Tensor) -> None:
        """Take more vectors in, shape ``(n, in)``, float32."""
        if len(vectors):
            mean = vectors.mean(0)
            centred = vectors - mean
            scatter = float(centred.square().sum())
            self.join(Components(self.keep, len(vectors), mean, centred, scatter))

    def join(self, other: Components) -> None:
        """Take in what others have seen."""
        if not other.count:
            return
        assert other.mean is not None and other.scaled is not None
        rows = [other.scaled]
        total = self.count + other.count
        if self.mean is None or self.scaled is None:
            self.mean = other.mean
        else:
            # The scatter of the two means about their common one (Ross et al., lemma 1).
            between = (self.count * other.count / total) ** 0.5 * (self.mean - other.mean)
            rows = [self.scaled, other.scaled, between[None]]
            self.mean = self.mean + (other.mean - self.mean) * (other.count / total)
            self.scatter += float(between.square().sum())
        self.scaled = _scaled_components(torch.cat(rows), self.keep)
        self.count = total
        self.scatter += other.scatter

    def explained(self, r: int) -> Tensor:
        """The share of the vectors' variance along each of the first r components, in descending
        order; fewer where the vectors span fewer.
        """
        sizes, spanned = self._sizes()
        return sizes[spanned][:r].square() / max(self.scatter, torch.finfo(sizes.dtype).tiny)

    def leading(self, r: int) -> Tensor:
        """The first r components, shape ``(r, in)``, orthonormal, each with its largest entry
        positive; fewer where the vectors span fewer.
        """
        assert self.scaled is not None
        sizes, spanned = self._sizes()
        found = (self.scaled / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)[:, None])[spanned][:r]
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        return found * largest.sign()

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """The singular values, and which of them are more than rounding."""
        assert self.scaled is not None and self.mean is not None
        sizes = self.scaled.norm(dim=1)
        # The mean of equal vectors is off by rounding, which all of them then seem to share.
        of_the_mean = 8 * self.count**0.5 * self.mean.norm()
        eps = torch.finfo(sizes.dtype).eps
        return sizes, sizes > eps * torch.maximum(sizes[0] * max(self.scaled.shape), of_the_mean)


def _scaled_components(rows: Tensor, keep: int) -> Tensor:
    if min(rows.shape) <= 4 * keep:
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    else:
        # An exact decomposition of some thousand inputs takes minutes in all layers together.
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            torch.manual_seed(0)
            _, S, V = torch.svd_lowrank(rows, q=2 * keep, niter=4)
        Vh = V.t()
    return S[:keep, None] * Vh[:keep]
