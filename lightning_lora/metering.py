"""The memory of a training step, metered on a model that has no memory.

The model's own forward and backward run on fake tensors (`torch._subclasses.fake_tensor`), which
have shapes, dtypes and storages of a size, and no data: a step of a model of any size takes seconds
and next to no memory. Every storage that an operation makes is counted from then until the last
tensor on it is gone, so that whatever the architecture does counts: what autograd keeps for
backward, gradient checkpointing, copies that autocast makes of weights, and temporaries.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora.kernels import kernels_of


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond the parameters, buffers and optimizer state in one training step.

    Attributes:
        activations: Kept when the forward pass has ended: for backward, and the batch.
        forward: Most in the forward pass.
        backward: Most in the backward pass, gradients of parameters left aside.
        backward_with_gradients: Most in the backward pass, with the gradients made so far.
        gradients: Gradients of the parameters.
    """

    activations: int
    forward: int
    backward: int
    backward_with_gradients: int
    gradients: int


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still in use.

    Args:
        known: Tensors whose storages do not count: parameters and buffers.

    Attributes:
        live: Bytes now.
        peak: Most bytes since `reset_peak`.
        live_gradients: Bytes of them that are gradients.
        peak_without_gradients: Most bytes since `reset_peak` that are no gradients.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.live_gradients = 0
        self.reset_peak()
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()
        # Held, so that none of their addresses is given to another storage.
        self._known = {t.untyped_storage()._cdata: t.untyped_storage() for t in known}

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        self.peak = self.live
        self.peak_without_gradients = self.live - self.live_gradients

    def mark_gradient(self, gradient: Tensor) -> None:
        """Count a tensor among the gradients from now on."""
        key = gradient.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self.live_gradients += self._sizes[key]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(
            self.peak_without_gradients, self.live - self.live_gradients
        )

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        if key in self._gradients:
            self._gradients.discard(key)
            self.live_gradients -= size


def meter_step(model: nn.Module, loss_of_step: Callable[[], Tensor]) -> StepMemory:
    """Run a forward and a backward pass and count what they hold.

    Args:
        model: The model, in training mode; on real or, inside `fake_model`, on fake tensors. Its
            gradients are gone afterwards.
        loss_of_step: Makes a batch and returns the loss, a scalar.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    with LiveStorages([*parameters, *model.buffers()]) as storages:
        handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: storages.mark_gradient(parameter.grad)
            )
            for parameter in parameters
            if parameter.requires_grad
        ]
        try:
            loss = loss_of_step()
            activations, forward = storages.live, storages.peak
            storages.reset_peak()
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        measured = StepMemory(
            activations=activations,
            forward=forward,
            backward=storages.peak_without_gradients,
            backward_with_gradients=storages.peak,
            gradients=storages.live_gradients,
        )
        for parameter in parameters:
            parameter.grad = None
    return measured


@contextmanager
def fake_model(model: nn.Module, device: str) -> Iterator[None]:
    """Give a model on the meta device fake tensors, and run by a device's kernels, for a while.

    The meta device knows no autocast; fake tensors that claim to lie on a CPU do.

    Args:
        model: A model all of whose parameters and buffers are on the meta device; they are put back
            at the end.
        device: `"cpu"` or `"cuda"`: whose kernels (see `kernels_of`).
    """
    places = [
        (store, name, value)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, value in store.items()
        if value is not None
    ]
    with FakeTensorMode(), kernels_of(device):
        # Tied weights stay one tensor.
        fakes: dict[int, Tensor] = {}
        for store, name, value in places:
            if id(value) not in fakes:
                fakes[id(value)] = _fake(value)
            store[name] = fakes[id(value)]  # type: ignore[assignment]
        try:
            yield
        finally:
            for store, name, value in places:
                store[name] = value  # type: ignore[assignment]


def _fake(value: Tensor) -> Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(fake, requires_grad=value.requires_grad)
    return fake
