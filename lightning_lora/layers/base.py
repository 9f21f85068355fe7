"""What every adapted layer offers, and the registry of the layer types that can be adapted."""

from __future__ import annotations

import copyreg
import dis
import importlib
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_lora.dora import direction_scale, weight_norm
from lightning_lora.errors import TargetError
from lightning_lora.layers.factors import LoRAFactors
from lightning_lora.sharded import whole
from lightning_lora.slices import Slices


class LoRALayer(nn.Module):
    """Mixin of an adapted layer: a subclass of the layer it adapts that a module's class is swapped
    to.

    A subclass names its ``base_class``, says the shapes of the factors, runs them in ``forward``
    and gives the update of the weight. Factors live in the child ``lora``; the base parameters keep
    their names and objects.
    """

    base_class: ClassVar[type[nn.Module]]
    lora: LoRAFactors
    # Whether the presets of target_modules count the layer among the linear ones.
    is_linear: ClassVar[bool] = True
    # The factor that is zero at first.
    zero_factor: ClassVar[str] = "B"
    # Whether its forward takes a magnitude (DoRA) into account.
    supports_dora: ClassVar[bool] = False
    # The dimension of the weight that its outputs lie along.
    out_dim: ClassVar[int] = 0
    # Whether a subclass of base_class with a forward around super().forward() is adapted inside it.
    adapts_inside_forward: ClassVar[bool] = False

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for adapting ``module`` at rank ``r``."""
        raise NotImplementedError

    @classmethod
    def weights(cls, module: nn.Module, slices: Slices | None = None) -> tuple[str, ...]:
        """Names of the parameters of ``module`` that are adapted.

        Args:
            module: The layer.
            slices: The parts that have factors, if not all.
        """
        return ("weight",)

    @classmethod
    def slices(cls, module: nn.Module, query_and_value: bool) -> Slices | None:
        """The parts of ``module`` that have factors of their own; ``None`` where one pair serves
        all of it.

        Args:
            module: The layer.
            query_and_value: Whether W_q and W_v alone are wanted, of a layer that knows them.
        """
        return None

    @classmethod
    def obstacle(cls, module: nn.Module, dropout: float) -> str | None:
        """Why this very module cannot be adapted with this dropout, or ``None``."""
        return None

    def delta_weight(self) -> Tensor:
        """The update of the base weight, in the weight's shape and the factors' dtype."""
        raise NotImplementedError

    def delta_weights(self) -> dict[str, Tensor]:
        """The update of each adapted parameter, by the parameter's name."""
        return {"weight": self.delta_weight()}

    def weight_norm(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """The norm of the updated weight of each output, shape ``(out,)``; see
        `lightning_lora.dora.weight_norm`.

        Args:
            weight: The whole base weight.
            A: The factor A.
            B: The factor B.
            scaling: The factor s.
        """
        return weight_norm(weight.movedim(self.out_dim, 0), A, B, scaling)

    def whole_weight(self) -> Tensor:
        """The whole base weight; of a sharded model a collective call."""
        return whole(cast(Tensor, self.weight))

    def measure(self) -> Tensor:
        """DoRA's magnitude before training, ``||W0 + s B A||``, shape ``(out,)`` in the dtype of
        the factors; on the meta device as long as the factors are. Of a sharded model a collective
        call.
        """
        if self.lora.A.is_meta:
            return self.lora.B.new_empty(self.lora.B.shape[:1])
        A, B = (whole(factor) for factor in self.lora.pair())
        return self.weight_norm(self.whole_weight(), A, B, self.lora.scaling)

    def merge_scale(self, weight: Tensor) -> Tensor | None:
        """What a merge multiplies the updated weight by, in the weight's number of dimensions;
        ``None`` without a magnitude.

        Args:
            weight: The whole base weight.
        """
        if self.lora.magnitude is None:
            return None
        norm = self.weight_norm(weight, *self.lora.pair(), self.lora.scaling)
        shape = [1] * weight.ndim
        shape[self.out_dim] = -1
        return direction_scale(self.lora.magnitude, norm).reshape(shape)


# Layers of packages that are imported only where a model brings them, and where each is adapted.
_ON_DEMAND = {
    ("transformers.pytorch_utils", "Conv1D"): "lightning_lora.layers.conv1d",
    (
        "transformers.models.falcon.modeling_falcon",
        "FalconLinear",
    ): "lightning_lora.layers.falcon",
    ("bitsandbytes.nn.modules", "Linear4bit"): "lightning_lora.layers.quantized",
    ("bitsandbytes.nn.modules", "Linear8bitLt"): "lightning_lora.layers.quantized",
}
_REGISTRY: dict[type[nn.Module], type[LoRALayer]] = {}
_FAMILIES: dict[str, tuple[Callable[[type[nn.Module]], bool], type[LoRALayer]]] = {}
_DERIVED: dict[type[nn.Module], type[LoRALayer]] = {}


def register_layer(adapted: type[LoRALayer]) -> type[LoRALayer]:
    """Make a layer type adaptable; usable as a class decorator.

    A layer that computes around one that can be adapted inherits from both, itself first:
    ``class LoRAScaled(Scaled, LoRALinear): base_class = Scaled``. A layer of another kind says the
    shapes of its factors, its forward and the update of its weight, as below. A and B are used
    inside the call of ``self.lora`` alone, which is where a sharded model has gathered them.

    DoRA is refused on a layer of another kind unless it sets ``supports_dora``, and its update
    takes the magnitude behind B (see `LoRAFactors.forward`).

    Args:
        adapted: A subclass of `LoRALayer` and of its own ``base_class``.

    Raises:
        TargetError: The class is not a subclass of `LoRALayer` and of its ``base_class``.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning_lora import inject_lora, merge_lora
        >>> class Transposed(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> @register_layer
        ... class LoRATransposed(LoRALayer, Transposed):
        ...     base_class = Transposed
        ...     out_dim = 1  # where the outputs lie in the weight
        ...     @classmethod
        ...     def factor_shapes(cls, module, r):
        ...         inputs, outputs = module.weight.shape
        ...         return (r, inputs), (outputs, r)
        ...     def forward(self, x):
        ...         return self.lora(self.updated, x)
        ...     def updated(self, x, A, B, scaling, dropout):
        ...         update = F.dropout(x, dropout) @ A.t() @ B.t()
        ...         return super().forward(x) + scaling * update
        ...     def delta_weight(self):
        ...         A, B = self.lora.pair()
        ...         return self.lora.scaling * (B @ A).t()
        >>> model = nn.Sequential(Transposed(4, 3))
        >>> inject_lora(model, r=2, alpha=6).lora_parameters
        14
        >>> with torch.no_grad():
        ...     _ = nn.init.ones_(model[0].lora.B)
        ...     adapted = model(torch.ones(1, 4))
        >>> _ = merge_lora(model)
        >>> type(model[0]).__name__, torch.allclose(model(torch.ones(1, 4)), adapted, atol=1e-5)
        ('Transposed', True)
    """
    base = getattr(adapted, "base_class", None)
    if base is None or not issubclass(adapted, base) or not issubclass(adapted, LoRALayer):
        raise TargetError(
            f"{adapted.__name__} must set base_class and derive from LoRALayer and it, so that a "
            "layer's class can be swapped in place."
        )
    _REGISTRY[base] = adapted
    return adapted


def register_family(
    label: str, matches: Callable[[type[nn.Module]], bool]
) -> Callable[[type[LoRALayer]], type[LoRALayer]]:
    """Make every layer type adaptable that a function recognises; a class decorator.

    For types with a common interface and no common base class.

    Args:
        label: What the types are called in lists of what is supported.
        matches: Whether a type belongs to the family.
    """

    def register(adapted: type[LoRALayer]) -> type[LoRALayer]:
        _FAMILIES[label] = matches, adapted
        return adapted

    return register


def supported_layers() -> tuple[str, ...]:
    """Names of the layer types that can be adapted."""
    registered = (f"{base.__module__}.{base.__qualname__}" for base in _REGISTRY)
    on_demand = (f"{module}.{name}" for module, name in _ON_DEMAND)
    return tuple(dict.fromkeys([*registered, *on_demand, *_FAMILIES]))


def adapted_class(layer: type[nn.Module]) -> type[LoRALayer] | None:
    """The class that a module of type ``layer`` is swapped to, or ``None`` if it cannot be adapted.

    A subclass of a registered type qualifies if it kept that type's ``forward``; one with a forward
    of its own would lose it in the swap, and needs `register_layer`. Embeddings that only compute
    around ``super().forward()`` (scaled or shifted ones) qualify too.
    """
    if (known := _REGISTRY.get(layer) or _DERIVED.get(layer)) is not None:
        return known
    for ancestor in layer.__mro__:
        home = _ON_DEMAND.get((ancestor.__module__, ancestor.__qualname__))
        if home is not None:
            importlib.import_module(home)
    if layer in _REGISTRY:
        return _REGISTRY[layer]
    for base, adapted in _REGISTRY.items():
        if not issubclass(layer, base) or issubclass(layer, LoRALayer):
            continue
        bases: tuple[type[nn.Module], ...]
        if layer.forward is base.forward and _conv_of(layer) is _conv_of(base):
            bases = (_Derived, adapted, layer)
        elif adapted.adapts_inside_forward and only_calls_super(layer.forward):
            bases = (_Derived, layer, adapted)
        else:
            continue
        return _derive(layer, bases)
    for matches, adapted in _FAMILIES.values():
        if matches(layer) and not issubclass(layer, LoRALayer):
            return _derive(layer, (_Derived, adapted, layer))
    return None


def _conv_of(layer: type[nn.Module]) -> Any:
    """What the forward of a convolution calls with its weight."""
    return getattr(layer, "_conv_forward", None)


def _derive(layer: type[nn.Module], bases: tuple[type[nn.Module], ...]) -> type[LoRALayer]:
    _DERIVED[layer] = type(f"LoRA{layer.__name__}", bases, {"base_class": layer})
    return _DERIVED[layer]


def only_calls_super(forward: Any) -> bool:
    """Whether a forward leaves the use of the weight to the one that it overrides."""
    code = getattr(forward, "__code__", None)
    if code is None or "__class__" not in code.co_freevars:
        return False
    names = {*code.co_names}
    if not {"super", "forward"} <= names or {"F", "functional", "embedding"} & names:
        return False
    # To cast to the dtype of the weight is no use of it.
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    return all(
        after.argval in ("dtype", "device", "shape")
        for step, after in itertools.pairwise(steps)
        if step.argval == "weight"
    )


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
