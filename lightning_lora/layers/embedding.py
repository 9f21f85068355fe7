"""LoRA on `torch.nn.Embedding`."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora.dora import direction_scale
from lightning_lora.functional import delta_weight
from lightning_lora.layers.base import LoRALayer, register_layer


@register_layer
class LoRAEmbedding(LoRALayer, nn.Embedding):
    """``W[i] + s * A^T[i] B^T``: a table of rows with a low-rank update (loralib's `Embedding`).

    Made by swapping the class of a `torch.nn.Embedding` in place (`lightning_lora.inject_lora`),
    never by a constructor. Maps integer indices of shape ``(...)`` to ``(..., embedding_dim)``.

    A is zero at first and B is drawn, so that rows which no batch held keep their base value, as in
    loralib and PEFT. A row at ``padding_idx`` gets no gradient and so no update. Indices have no
    dropout, and the gradients of the factors are dense also with ``sparse=True``, which is about
    the gradient of the frozen table.

    With a magnitude (DoRA) the columns of the table are what has norms, as in PEFT: m has shape
    ``(embedding_dim,)``, and a step moves all rows.

    Attributes:
        weight: The base table W, shape ``(num_embeddings, embedding_dim)``, usually frozen.
        lora: The factors A ``(r, num_embeddings)`` and B ``(embedding_dim, r)``.
    """

    base_class = nn.Embedding
    is_linear: ClassVar[bool] = False
    adapts_inside_forward: ClassVar[bool] = True
    zero_factor: ClassVar[str] = "A"
    supports_dora: ClassVar[bool] = True
    out_dim: ClassVar[int] = 1

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, num_embeddings)`` and ``(embedding_dim, r)``."""
        assert isinstance(module, nn.Embedding)
        return (r, module.num_embeddings), (module.embedding_dim, r)

    @classmethod
    def obstacle(cls, module: nn.Module, dropout: float) -> str | None:
        """``max_norm`` rules an embedding out."""
        if getattr(module, "max_norm", None) is not None:
            return (
                "its max_norm rescales rows of the base table in place whenever they are looked "
                "up, so the base would not stay as it is; build it with max_norm=None"
            )
        return None

    def delta_weight(self) -> Tensor:
        """``s * (B @ A)^T``, shape ``(num_embeddings, embedding_dim)``."""
        return delta_weight(*self.lora.pair(), self.lora.scaling).t()

    def forward(self, input: Tensor) -> Tensor:
        """Map indices of shape ``(...)`` to rows, ``(..., embedding_dim)``."""
        look_up = self._look_up if self.lora.magnitude is None else self._look_up_scaled
        out: Tensor = self.lora(look_up, input)
        return out

    def _look_up(
        self, indices: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        rows = nn.Embedding.forward(self, indices)
        return rows + (F.linear(self._hidden(indices, A), B) * scaling).to(rows.dtype)

    def _look_up_scaled(
        self,
        indices: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        rows = nn.Embedding.forward(self, indices)
        scale = direction_scale(magnitude, self.weight_norm(self.weight, A, B, scaling))
        update = F.linear(self._hidden(indices, A), B) * scaling
        return ((rows.to(scale.dtype) + update) * scale).to(rows.dtype)

    def _hidden(self, indices: Tensor, A: Tensor) -> Tensor:
        return F.embedding(
            indices, A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
