"""LoRA on `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.functional import delta_weight
from lightning_lora.layers.base import LoRALayer, register_layer
from lightning_lora.slices import Slices
from lightning_lora.stand_in import StandIn, summed, updated


@register_layer
class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """Attention with ``W + s * B @ A`` in its in-projections, and in ``out_proj`` where that is
    adapted too.

    Made by swapping the class of a `torch.nn.MultiheadAttention` in place
    (`lightning_lora.inject_lora`), never by a constructor. PyTorch reads the weights of the
    projections instead of calling layers, so the updates are added to the weights in every forward
    pass, as a merge would; dropout on the adapter's input cannot be had this way. Without gradients
    the output is at first bitwise that of the base; with them PyTorch folds the products of a
    weight that wants a gradient in another order, which may differ in the last bit.

    Attributes:
        in_proj_weight: The base weight of all three projections, shape
            ``(3 * embed_dim, embed_dim)``; ``None`` where keys or values have other widths: there
            ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` hold one each, shape
            ``(embed_dim, width)``.
        lora: The factors A ``(r, embed_dim)`` and B ``(3 * embed_dim, r)``; separate projections
            have a pair each, see `lightning_lora.slices.Slices`.
    """

    base_class = nn.MultiheadAttention

    @classmethod
    def weights(cls, module: nn.Module, slices: Slices | None = None) -> tuple[str, ...]:
        """``in_proj_weight``, or those of separate projections."""
        assert isinstance(module, nn.MultiheadAttention)
        if module._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return tuple(f"{part}_proj_weight" for part in (slices.adapted if slices else "qkv"))

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, embed_dim)`` and ``(3 * embed_dim, r)``."""
        assert isinstance(module, nn.MultiheadAttention)
        return (r, module.embed_dim), (3 * module.embed_dim, r)

    @classmethod
    def slices(cls, module: nn.Module, query_and_value: bool) -> Slices | None:
        """W_q and W_v if asked for, else the whole; separate projections have a pair each."""
        assert isinstance(module, nn.MultiheadAttention)
        parts = tuple((part, module.embed_dim) for part in "qkv")
        adapted = ("q", "v") if query_and_value else ("q", "k", "v")
        if module._qkv_same_embed_dim:
            return Slices(parts, adapted) if query_and_value else None
        return Slices(parts, adapted, widths=(module.embed_dim, module.kdim, module.vdim))

    @classmethod
    def obstacle(cls, module: nn.Module, dropout: float) -> str | None:
        """Dropout rules it out."""
        if dropout > 0:
            return (
                "PyTorch gives nn.MultiheadAttention no place for dropout on the adapter's input; "
                "set dropout to 0 to adapt it"
            )
        return None

    def delta_weights(self) -> dict[str, Tensor]:
        """The update of each projection weight, by its name."""
        return self._updates(*self.lora.pair(), self.lora.scaling)

    def _updates(self, A: Tensor, B: Tensor, scaling: float) -> dict[str, Tensor]:
        slices = self.lora.slices
        if slices is None or slices.widths is None:
            return {"in_proj_weight": delta_weight(A, B, scaling)}
        blocks = slices.blocks(A, B)
        return {
            f"{part}_proj_weight": delta_weight(*block, scaling) for part, block in blocks.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`."""
        out_weight = self.out_proj.weight
        if isinstance(self.out_proj, LoRALayer):
            out_weight = self.out_proj.lora(updated, out_weight)
        weights = self.lora(self._updated_weights)
        out = StandIn(self.out_proj, {"weight": out_weight})
        base: Any = self.base_class
        attended: tuple[Tensor, Tensor | None] = base.forward(
            StandIn(self, {**weights, "out_proj": out}), *args, **kwargs
        )
        return attended

    def _updated_weights(
        self, A: Tensor, B: Tensor, scaling: float, dropout: float
    ) -> dict[str, Tensor]:
        with torch.autocast(A.device.type, enabled=False):
            updates = self._updates(A, B, scaling)
        return {name: summed(getattr(self, name), update) for name, update in updates.items()}
