"""The state of the random generators of a process, in a form that a checkpoint can hold."""

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
        batch_sampler = getattr(loader, "batch_sampler", None)
        samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        for owner in (loader, batch_sampler, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
