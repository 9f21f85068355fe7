"""Batches of rows of like length, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

_WINDOW = 50


class GroupedSampler(DistributedSampler):
    """Orders rows so that consecutive batches hold rows of like length.

    Rows are drawn in a new order each epoch, sorted by length within windows of 50 batches, cut
    into batches, and the batches are drawn in a new order: which rows meet changes from epoch to
    epoch, and a batch's length says nothing about when it comes. (The length-grouped sampling of
    `transformers`, with the order of the batches shuffled as well.) Without shuffling the whole
    data are sorted, and the batches come in a fixed mixed order, so that the first few of them
    are like the rest.

    The order follows from the seed and the epoch alone. Under several ranks each takes its share of
    every batch, rows of like length again; the last rows are repeated until all ranks have as many.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in a batch of one rank.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Settles the order, with the epoch.
        num_replicas: Ranks that share the data.
        rank: Which of them this is.

    Example:
        >>> order = list(GroupedSampler([9, 1, 8, 2], batch_size=2, shuffle=False))
        >>> sorted([sorted(order[:2]), sorted(order[2:])])
        [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            _Sized(len(lengths)), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed
        )
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        batches = self._batches()
        # Filling up takes rows from the beginning of the same order.
        order = torch.cat(batches)
        missing = self.total_size - len(order)
        if missing:
            repeats = -(-missing // len(order))
            batches[-1] = torch.cat([batches[-1], order.repeat(repeats)[:missing]])
        own = [batch[self.rank :: self.num_replicas] for batch in batches]
        return iter(torch.cat(own).tolist())

    def _batches(self) -> list[torch.Tensor]:
        """Rows of each batch over all ranks; the last one may be short."""
        size = self.batch_size * self.num_replicas
        generator = torch.Generator().manual_seed(self.seed + self.epoch * self.shuffle)
        if self.shuffle:
            order = torch.randperm(len(self.lengths), generator=generator)
            windows = list(order.split(size * _WINDOW))
        else:
            windows = [torch.arange(len(self.lengths))]
        # Stable, so that rows of equal length stay in the order they were drawn in.
        ordered = [
            rows[self.lengths[rows].argsort(stable=True, descending=True)] for rows in windows
        ]
        batches = [batch for rows in ordered for batch in rows.split(size)]
        # A loader cuts the order into pieces of one size: the short batch has to be the last.
        full = [batch for batch in batches if len(batch) == size]
        short = [batch for batch in batches if len(batch) < size]
        mixed = torch.randperm(len(full), generator=generator).tolist()
        return [full[number] for number in mixed] + short


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Return the share of padding among all tokens that are computed.

    Args:
        lengths: Tokens of each row.
        order: The rows in the order in which batches are cut from them.
        batch_size: Rows in a batch.

    Example:
        >>> padding_share([1, 3, 1, 3], [0, 1, 2, 3], batch_size=2)
        0.3333333333333333
    """
    ordered = torch.as_tensor(lengths)[torch.as_tensor(order)]
    computed = sum(int(batch.max()) * len(batch) for batch in ordered.split(batch_size))
    return (computed - int(ordered.sum())) / computed


class _Sized(Dataset):
    """What a `DistributedSampler` wants to know of a dataset: how many rows it has."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows
