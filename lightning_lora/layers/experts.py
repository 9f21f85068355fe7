"""LoRA on the experts of mixture-of-experts models, whose weights are 3-D parameters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer, register_family
from lightning_lora.slices import Slices
from lightning_lora.stand_in import StandIn, summed


def _is_experts(layer: type[nn.Module]) -> bool:
    """Whether a class is one of the experts modules of `transformers`, which share an interface."""
    known = layer.__module__.startswith("transformers.") and layer.__name__.endswith("Experts")
    return known and hasattr(layer, "_apply_gate")


@register_family("transformers' experts (gate_up_proj and down_proj in 3-D)", _is_experts)
class LoRAExperts(LoRALayer):
    """Experts over ``W_e + s * B_e @ A_e``: each expert's two matrices get factors of rank r.

    Made by swapping the class of an experts module (``MixtralExperts``, ``Qwen3MoeExperts``,
    ``GptOssExperts``...) in place, never by a constructor, where its name is given; no preset
    adapts it. The updates are added to the weights in every forward pass, as a merge would, so a
    pass holds the weights of such a module twice, and there is no dropout on the adapter's input.

    Attributes:
        gate_up_proj: The base weights, shape ``(experts, 2 * intermediate, hidden)``, or with the
            last two transposed (gpt-oss); ``up_proj`` where there is no gate.
        down_proj: The base weights, shape ``(experts, hidden, intermediate)``, or likewise.
        lora: The factors of both, A side by side, ``(experts * r, hidden + intermediate)``, B one
            below the other, ``(2 * intermediate + hidden, r * experts)``, as PEFT keeps them.
    """

    is_linear: ClassVar[bool] = False

    @classmethod
    def weights(cls, module: nn.Module, slices: Slices | None = None) -> tuple[str, ...]:
        """``gate_up_proj`` (or ``up_proj``) and ``down_proj``."""
        up = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
        return up, "down_proj"

    @classmethod
    def slices(cls, module: nn.Module, query_and_value: bool) -> Slices | None:
        """The two matrices have a pair each."""
        shapes = {name: _matrix(module, name) for name in cls.weights(module)}
        parts = tuple((name, rows) for name, (rows, _) in shapes.items())
        widths = tuple(width for _, width in shapes.values())
        return Slices(parts, tuple(shapes), widths=widths)

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(experts * r, hidden)`` and ``(rows of both, r * experts)``."""
        shapes = [_matrix(module, name) for name in cls.weights(module)]
        experts = _experts(module)
        return (experts * r, shapes[0][1]), (sum(rows for rows, _ in shapes), experts * r)

    @classmethod
    def obstacle(cls, module: nn.Module, dropout: float) -> str | None:
        """Dropout and expert parallelism rule it out, and so do weights of another form."""
        weights = [module._parameters.get(name) for name in cls.weights(module)]
        if any(weight is None or weight.ndim != 3 for weight in weights):
            return "its experts are not kept in two 3-D parameters"
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are spread over processes"
        if dropout > 0:
            return (
                "the update is added to the weights of experts, which leaves no place for dropout "
                "on the adapter's input; set dropout to 0 to adapt them"
            )
        return None

    def delta_weights(self) -> dict[str, Tensor]:
        """The update of each 3-D weight, by its name."""
        return self._updates(*self.lora.pair(), self.lora.scaling)

    def _updates(self, A: Tensor, B: Tensor, scaling: float) -> dict[str, Tensor]:
        slices, experts = self.lora.slices, _experts(self)
        assert slices is not None
        updates = {}
        for name, (down, up) in slices.blocks(A, B).items():
            first = down.reshape(experts, -1, down.shape[1])
            second = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1) * scaling
            update = torch.bmm(second, first)
            updates[name] = update.transpose(1, 2) if _is_transposed(self) else update
        return updates

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base module's."""
        base: Any = self.base_class
        weights = self.lora(self._updated_weights)
        out: Tensor = base.forward(StandIn(self, weights), *args, **kwargs)
        return out

    def _updated_weights(
        self, A: Tensor, B: Tensor, scaling: float, dropout: float
    ) -> dict[str, Tensor]:
        with torch.autocast(A.device.type, enabled=False):
            updates = self._updates(A, B, scaling)
            return {name: summed(getattr(self, name), update) for name, update in updates.items()}


def _experts(module: nn.Module) -> int:
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _matrix(module: nn.Module, name: str) -> tuple[int, int]:
    """Output rows and input width of one expert's matrix."""
    _, rows, width = getattr(module, name).shape
    return (width, rows) if _is_transposed(module) else (rows, width)
