"""LoRA on `torch.nn.Embedding`."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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

    Attributes:
        weight: The base table W, shape ``(num_embeddings, embedding_dim)``, usually frozen.
        lora: The factors A ``(r, num_embeddings)`` and B ``(embedding_dim, r)``.
    """

    base_class = nn.Embedding
    is_linear: ClassVar[bool] = False
    adapts_inside_forward: ClassVar[bool] = True
    zero_factor: ClassVar[str] = "A"

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
        out: Tensor = self.lora(self._look_up, input)
        return out

    def _look_up(
        self, indices: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        rows = nn.Embedding.forward(self, indices)
        hidden = F.embedding(
            indices, A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
        return rows + (F.linear(hidden, B) * scaling).to(rows.dtype)
