"""The state of the random generators and the seeds of a process, in a form that a checkpoint can
hold.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]


def capture_rng(generators: Sequence[torch.Generator] = ()) -> RngState:
    """The state of every global random generator, and of `generators`, as tensors and primitives.

    Covers Python's `random`, numpy's legacy global state, torch on the CPU and every CUDA device.

    Args:
        generators: Further generators, such as those of data loaders.

    Returns:
        A state for `restore_rng`, readable with `torch.load(weights_only=True)`.
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy_state
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": [version, torch.from_numpy(np.array(words, np.uint32).view(np.int32)), gauss],
        "numpy": [torch.from_numpy(keys.view(np.int32)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "generators": [generator.get_state() for generator in generators],
    }


def restore_rng(state: RngState, generators: Sequence[torch.Generator] = ()) -> None:
    """Put back what `capture_rng` returned.

    Args:
        state: What `capture_rng` returned.
        generators: The same further generators, in the same order.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.numpy().view(np.uint32).tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    numpy_state = ("MT19937", keys.numpy().view(np.uint32), position, has_gauss, cached)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        for device, cuda_state in zip(devices, state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda_state, device)
    for generator, generator_state in zip(generators, state["generators"], strict=False):
        generator.set_state(generator_state)


def loader_generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The generators that users handed to loaders and samplers, each once.

    Args:
        loaders: Data loaders, or any other iterables.

    Returns:
        The generators in a stable order.
    """
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        for owner in _sampling(loader):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _sampling(loader: Any) -> tuple[Any, ...]:
    """What may settle the order of a loader's rows."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    return (loader, batch_sampler, *samplers)


class SamplerSeeds:
    """Seeds of samplers that shuffle by a seed and the epoch, as distributed ones do.

    Lightning gives its samplers the seed of `seed_everything`, which a resuming process may never
    have called.

    Args:
        saved: The seeds of the first run, as `of` returned them; none: every sampler keeps its own.
    """

    def __init__(self, saved: Sequence[int] = ()) -> None:
        self._saved = list(saved)
        self._own: list[int] | None = None

    @staticmethod
    def of(loaders: Iterable[Any]) -> list[int]:
        """The seed of each such sampler, in a stable order."""
        return [sampler.seed for sampler in _seeded(loaders)]

    def put_into(self, loaders: Iterable[Any]) -> None:
        """Give loaders that were made in this process the seeds of the first run.

        Args:
            loaders: The loaders, or what has replaced them since the last call.
        """
        samplers = _seeded(loaders)
        if self._own is None:
            self._own = [sampler.seed for sampler in samplers]
        for sampler, own, saved in zip(samplers, self._own, self._saved, strict=False):
            # Loaders made later may have seeds of their own, by the epoch for instance.
            if sampler.seed == own:
                sampler.seed = saved


def _seeded(loaders: Iterable[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for loader in loaders:
        for owner in _sampling(loader):
            if isinstance(getattr(owner, "seed", None), int) and hasattr(owner, "set_epoch"):
                found[id(owner)] = owner
    return list(found.values())
