"""What every adapted layer offers, and the registry of the layer types that can be adapted."""

from __future__ import annotations

import copyreg
import importlib
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora.errors import TargetError
from lightning_lora.layers.factors import LoRAFactors


class LoRALayer(nn.Module):
    """Mixin of an adapted layer: a subclass of the layer it adapts that a module's class is swapped
    to.

    A subclass names its ``base_class``, says the shapes of the factors, runs them in ``forward``
    and gives the update of the weight. Factors live in the child ``lora``; the base parameters keep
    their names and objects.
    """

    base_class: ClassVar[type[nn.Module]]
    lora: LoRAFactors

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for adapting ``module`` at rank ``r``."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why this very module cannot be adapted though its type can, or ``None``."""
        return None

    def delta_weight(self) -> Tensor:
        """The update of the base weight, in the weight's shape and the factors' dtype."""
        raise NotImplementedError


# Layers of packages that are imported only where a model brings them, and where each is adapted.
_ON_DEMAND = {
    ("transformers.pytorch_utils", "Conv1D"): "lightning_lora.layers.conv1d",
    ("bitsandbytes.nn.modules", "Linear4bit"): "lightning_lora.layers.quantized",
    ("bitsandbytes.nn.modules", "Linear8bitLt"): "lightning_lora.layers.quantized",
}
_REGISTRY: dict[type[nn.Module], type[LoRALayer]] = {}
_DERIVED: dict[type[nn.Module], type[LoRALayer]] = {}


def register_layer(adapted: type[LoRALayer]) -> type[LoRALayer]:
    """Make a layer type adaptable; usable as a class decorator.

    Args:
        adapted: A subclass of `LoRALayer` and of its own ``base_class``.

    Raises:
        TargetError: The class is not a subclass of `LoRALayer` and of its ``base_class``.
    """
    base = getattr(adapted, "base_class", None)
    if base is None or not issubclass(adapted, base) or not issubclass(adapted, LoRALayer):
        raise TargetError(
            f"{adapted.__name__} must set base_class and derive from LoRALayer and it, so that a "
            "layer's class can be swapped in place."
        )
    _REGISTRY[base] = adapted
    return adapted


def supported_layers() -> tuple[str, ...]:
    """Names of the layer types that can be adapted."""
    registered = (f"{base.__module__}.{base.__qualname__}" for base in _REGISTRY)
    on_demand = (f"{module}.{name}" for module, name in _ON_DEMAND)
    return tuple(dict.fromkeys([*registered, *on_demand]))


def adapted_class(layer: type[nn.Module]) -> type[LoRALayer] | None:
    """The class that a module of type ``layer`` is swapped to, or ``None`` if it cannot be adapted.

    A subclass of a registered type qualifies if it kept that type's ``forward``; one with a forward
    of its own would lose it in the swap, and needs `register_layer`.
    """
    for ancestor in layer.__mro__:
        home = _ON_DEMAND.get((ancestor.__module__, ancestor.__qualname__))
        if home is not None:
            importlib.import_module(home)
    if layer in _REGISTRY:
        return _REGISTRY[layer]
    if layer in _DERIVED:
        return _DERIVED[layer]
    for base, adapted in _REGISTRY.items():
        if (
            issubclass(layer, base)
            and not issubclass(layer, LoRALayer)
            and layer.forward is base.forward
        ):
            derived = type(
                f"LoRA{layer.__name__}", (_Derived, adapted, layer), {"base_class": layer}
            )
            _DERIVED[layer] = derived
            return derived
    return None


class _Derived(LoRALayer):
    """Makes instances of classes that were built at run time picklable."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self.base_class,), state


def _rebuild(base: type[nn.Module]) -> LoRALayer:
    adapted = adapted_class(base)
    if adapted is None:
        raise TargetError(
            f"{base.__name__} was adapted when it was saved, but cannot be adapted now."
        )
    return copyreg.__newobj__(adapted)  # type: ignore[attr-defined]
