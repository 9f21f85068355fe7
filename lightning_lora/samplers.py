"""Seeds of distributed samplers: they shuffle by them, and not by the global random state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def sampler_seeds(loaders: Iterable[Any]) -> list[int | None]:
    """For each loader, the seed that its sampler shuffles by; ``None`` where it has none."""
    return [getattr(sampler, "seed", None) for sampler in map(_seeded_sampler, loaders)]


def seed_samplers(loaders: Iterable[Any], seeds: Sequence[int | None]) -> None:
    """Give samplers the seeds that `sampler_seeds` has returned, perhaps in another process."""
    for loader, seed in zip(loaders, seeds, strict=False):
        sampler = _seeded_sampler(loader)
        if sampler is not None and seed is not None:
            sampler.seed = seed


def _seeded_sampler(loader: Any) -> Any:
    """A sampler with the interface of `torch.utils.data.DistributedSampler`."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None), batches):
        if hasattr(sampler, "set_epoch") and isinstance(getattr(sampler, "seed", None), int):
            return sampler
    return None
