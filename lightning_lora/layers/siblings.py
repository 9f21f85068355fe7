"""Layers that are called with the very same input, run as one.

The query, key and value projections of an attention, or the gate and up projections of a
feed-forward block, read one tensor. Which layers do so is not known from their names but seen in
the first pass; from then on the first of them to be called computes for all, and the others hand
out what is theirs. Every layer is still called, hooks run, and whatever is not as expected (another
input, a changed one, a weight that is elsewhere) is computed by the layer alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_lora.functional import LoRAProjection, compute_dtype, lora_linears
from lightning_lora.layers.factors import LoRAFactors


class Siblings:
    """Adapted linear layers of one parent module.

    Args:
        layers: The layers, which have a ``weight``, a ``bias`` and factors ``lora``.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers: tuple[Any, ...] = tuple(layers)
        self._forget()

    def _forget(self) -> None:
        self.runs: list[list[Any]] = []
        self.latest: Any = None
        self.groups: dict[Any, tuple[Any, ...]] | None = None
        # Nodes of the graphs that layers have made alone.
        self.alone: list[Any] | None = []
        self._clear()

    def _clear(self) -> None:
        self.ready: dict[Any, tuple[Tensor, tuple[Any, ...]]] = {}
        self.made_from: Tensor | None = None
        self.made_as: tuple[Any, ...] = ()

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of one of the layers, or ``None`` where it has to compute it itself.

        Args:
            layer: The layer that is called.
            x: Its input.
        """
        if self.groups is None:
            self._observe(layer, x)
        if self.groups is None:
            return None
        if layer in self.ready and self.made_from is x and self.made_as == _circumstances(x):
            out, versions = self.ready.pop(layer)
            if not self.ready:
                self._clear()
            # An optimizer may have made a step since, or a backward pass have freed the node.
            if versions == _versions(layer) and not getattr(out.grad_fn, "done", False):
                return out
        # Of an input that comes from nowhere each layer may have a backward pass of its own.
        if x.grad_fn is None or layer not in self.groups or not self._may_join():
            return None
        self._clear()
        group = self.groups[layer]
        if not all(_is_plain(each, x) for each in group):
            return None
        if _is_reentrant_recomputation() and any(
            each.lora.training and each.lora.dropout for each in group
        ):
            return None
        projections = [_projection(each) for each in group]
        out, *others = lora_linears(x, projections)
        self.ready = {
            other: (made, _versions(other)) for other, made in zip(group[1:], others, strict=True)
        }
        self.made_from, self.made_as = x, _circumstances(x)
        return out

    def note(self, layer: nn.Module, out: Tensor) -> None:
        """Remember what a layer has computed by itself."""
        if self.alone is None or not hasattr(out.grad_fn, "done"):
            return
        if self.groups is None or any(layer in group for group in self.groups.values()):
            self.alone.append(weakref.ref(out.grad_fn))

    def _may_join(self) -> bool:
        """Whether every backward pass of what was computed alone is over.

        One that computes a checkpointed part again has to save the same tensors as the forward
        pass did.
        """
        if self.alone is None:
            return True
        if _is_in_backward() and _hooks() is not None:
            # A backward pass that retains its graph may be followed by another.
            return False
        self.alone = [ref for ref in self.alone if not getattr(ref(), "done", ref() is None)]
        if self.alone:
            return False
        self.alone = None
        return True

    def let_go(self) -> None:
        """Drop what was computed for layers that were not called."""
        if self.ready:
            self._clear()

    def found(self) -> list[tuple[Any, ...]]:
        """The groups that have been seen."""
        if self.groups is not None:
            return list(self.groups.values())
        return [tuple(run) for run in self.runs if len(run) > 1]

    def know(self, groups: Iterable[tuple[Any, ...]]) -> None:
        """Join these groups from the next pass on."""
        self.groups = {group[0]: group for group in groups}
        self.runs, self.latest, self.alone = [], None, None

    def _observe(self, layer: nn.Module, x: Tensor) -> None:
        if any(layer in run for run in self.runs):
            # The second pass begins: all has been seen.
            self.groups = {group[0]: group for group in self.found()}
            self.runs, self.latest = [], None
            return
        if self.latest is not None and self.latest() is x:
            self.runs[-1].append(layer)
        else:
            self.runs.append([layer])
        self.latest = weakref.ref(x)

    def __getstate__(self) -> dict[str, Any]:
        # What was seen holds tensors of a pass, and is seen again.
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()


def join_siblings(layers: Iterable[nn.Module]) -> None:
    """Let adapted layers of one parent run as one where they read the same input."""
    by_width: dict[int, list[nn.Module]] = {}
    for layer in layers:
        by_width.setdefault(layer.in_features, []).append(layer)  # type: ignore[arg-type]
    for alike in by_width.values():
        if len(alike) > 1:
            siblings = Siblings(alike)
            for layer in alike:
                layer.__dict__["siblings"] = siblings


def joined_layers(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names of the layers that run as one, for a run that goes on elsewhere: whether they do
    decides how sums are rounded.

    Args:
        modules: The model's modules by name.
    """
    names = {id(module): name for name, module in modules.items()}
    every = {id(s): s for m in modules.values() if (s := m.__dict__.get("siblings")) is not None}
    return [[names[id(layer)] for layer in group] for s in every.values() for group in s.found()]


def join_layers(modules: Mapping[str, nn.Module], groups: Iterable[Iterable[str]]) -> None:
    """Let layers run as one that did so elsewhere.

    Args:
        modules: The model's modules by name.
        groups: What `joined_layers` has returned.
    """
    known: dict[int, tuple[Siblings, list[tuple[Any, ...]]]] = {}
    for names in groups:
        layers = tuple(modules[name] for name in names if name in modules)
        owners = {id(s): s for m in layers if (s := m.__dict__.get("siblings")) is not None}
        if len(owners) == 1 and len(layers) > 1:
            ((key, siblings),) = owners.items()
            known.setdefault(key, (siblings, []))[1].append(layers)
    for siblings, found in known.values():
        siblings.know(found)


def part_siblings(layer: nn.Module) -> None:
    """Undo `join_siblings` for one layer."""
    layer.__dict__.pop("siblings", None)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether nothing but the layer's own parameters stands behind its call."""
    lora, weight = layer.lora, layer.weight
    return (
        type(lora) is LoRAFactors
        and lora.magnitude is None
        and not (lora._forward_hooks or lora._forward_pre_hooks)
        and not (lora._backward_hooks or lora._backward_pre_hooks)
        and type(weight) in (Tensor, Parameter)
        and weight.device == x.device == lora.A.device
        and not weight.requires_grad
    )


def _projection(layer: Any) -> LoRAProjection:
    lora = layer.lora
    dropout = lora.dropout if lora.training else 0.0
    A, B = lora.pair()
    return LoRAProjection(layer.weight, layer.bias, A, B, lora.scaling, dropout)


def _versions(layer: Any) -> tuple[Any, ...]:
    """What stands behind a layer's output: each parameter, where it lies and how often it was
    changed, and the settings of the factors.
    """
    lora = layer.lora
    tensors = (layer.weight, layer.bias, lora.A, lora.B)
    states = [(each._version, each.data_ptr()) for each in tensors if each is not None]
    return (*states, lora.scaling, lora.dropout, lora.training)


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    # A checkpointed part must save the same tensors when it is computed again in the backward pass:
    # it takes nothing that was computed outside it, or in another pass.
    hooks = _hooks()
    region = None if hooks is None else weakref.ref(hooks[0])
    task = torch._C._current_graph_task_id()
    return x._version, x.requires_grad, compute_dtype(x), torch.is_grad_enabled(), task, region


def _is_reentrant_recomputation() -> bool:
    """Whether a reentrant checkpoint computes its part again.

    Its forward pass ran without gradients, and so each layer drew its dropout when it was called.
    """
    return _is_in_backward() and _hooks() is None


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _hooks() -> Any:
    """What stands in for saving tensors at the moment: checkpoints that are not reentrant do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
