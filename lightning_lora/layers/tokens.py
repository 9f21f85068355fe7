"""Embeddings, and heads tied to them, of which some rows train."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora.errors import TargetError
from lightning_lora.layers.base import only_calls_super
from lightning_lora.layers.masters import Masters


class TokenRows(Masters):
    """The rows of a table that train, in the place of the table's own.

    Args:
        weight: The table, shape ``(tokens, width)``.
        indices: Which of its rows train.

    Attributes:
        rows: Parameter of shape ``(n, width)``, in the order of the indices.
    """

    sorted: Tensor
    order: Tensor
    indices: Tensor

    def __init__(self, weight: Tensor, indices: Sequence[int]) -> None:
        super().__init__()
        order = torch.tensor(sorted(range(len(indices)), key=lambda n: indices[n]))
        index = torch.tensor(list(indices))
        for name, value in (("indices", index), ("order", order), ("sorted", index[order])):
            self.register_buffer(name, value.to(weight.device), persistent=False)
        own = weight.detach()[self.indices].to(self.dtype_for(weight.dtype), copy=True)
        self.rows = nn.Parameter(own)

    def forward(self, update: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run ``update(*inputs, rows)``; a module call, as of `LoRAFactors`."""
        return update(*inputs, self.rows)

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have a row here, and the number of the row; of others any number."""
        found = torch.searchsorted(self.sorted, tokens).clamp_(max=len(self.sorted) - 1)
        return self.sorted[found] == tokens, self.order[found]

    def write_into(self, table: Tensor, rows: Tensor, offset: int = 0) -> None:
        """Put rows in their places in a table.

        Args:
            table: The table, or the rows of it from ``offset`` on.
            rows: All rows, whole.
            offset: Which row of the whole table the given one starts with.
        """
        here = (self.indices >= offset) & (self.indices < offset + len(table))
        table[self.indices[here] - offset] = rows[here].to(table)

    def extra_repr(self) -> str:
        """How many rows, for `print`."""
        return f"{len(self.rows)} rows"


class TokenLayer(nn.Module):
    """Mixin of a layer that has a `TokenRows`; a layer's class is swapped to it in place."""

    base_class: ClassVar[type[nn.Module]]
    trainable_tokens: TokenRows

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self.base_class,), state


class TokenEmbedding(TokenLayer, nn.Embedding):
    """`torch.nn.Embedding` of which some rows train."""

    base_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Map indices of shape ``(...)`` to rows, ``(..., embedding_dim)``."""
        out: Tensor = self.trainable_tokens(self._look_up, input)
        return out

    def _look_up(self, tokens: Tensor, rows: Tensor) -> Tensor:
        out = nn.Embedding.forward(self, tokens)
        own, numbers = self.trainable_tokens.places(tokens)
        return torch.where(own[..., None], F.embedding(numbers, rows).to(out.dtype), out)


class TokenLinear(TokenLayer, nn.Linear):
    """`torch.nn.Linear` over a table of which some rows train: a tied head."""

    base_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        out: Tensor = self.trainable_tokens(self._project, input)
        return out

    def _project(self, x: Tensor, rows: Tensor) -> Tensor:
        index = self.trainable_tokens.indices
        out = F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[index]
        own = F.linear(x, rows.to(x.dtype), bias)
        return out.index_copy_(-1, index, own.to(out.dtype))


_DERIVED: dict[type[nn.Module], type[TokenLayer]] = {
    nn.Embedding: TokenEmbedding,
    nn.Linear: TokenLinear,
}


def token_class(layer: type[nn.Module]) -> type[TokenLayer] | None:
    """The class that a layer is swapped to, or ``None`` if rows of it cannot train.

    Embeddings that only compute around ``super().forward()`` (scaled ones) qualify too.
    """
    if layer in _DERIVED:
        return _DERIVED[layer]
    for base, own in ((nn.Embedding, TokenEmbedding), (nn.Linear, TokenLinear)):
        if not issubclass(layer, base) or issubclass(layer, TokenLayer):
            continue
        if layer.forward is base.forward:
            bases: tuple[type[nn.Module], ...] = (own, layer)
        elif base is nn.Embedding and only_calls_super(layer.forward):
            bases = (layer, own)
        else:
            continue
        _DERIVED[layer] = type(f"Token{layer.__name__}", bases, {"base_class": layer})
        return _DERIVED[layer]
    return None


def _rebuild(base: type[nn.Module]) -> TokenLayer:
    own = token_class(base)
    if own is None:
        raise TargetError(f"Rows of {base.__name__} trained when it was saved, but cannot now.")
    return copyreg.__newobj__(own)  # type: ignore[attr-defined]
