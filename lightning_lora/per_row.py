"""A batch whose rows use different adapters: PEFT's ``adapter_names`` of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_lora.adapter_set import BASE, adapter_of, alone
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.functional import lora_linear
from lightning_lora.injection import Injection
from lightning_lora.names import clean_name, listed, persistent_buffers
from lightning_lora.parking import Waiting, attach
from lightning_lora.plan import Plan, Target
from lightning_lora.removal import remove_lora

_REFUSED = ("MultiheadAttention", "Experts")


@contextmanager
def adapter_per_row(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch run through an adapter of its own while the context lasts.

    A linear layer's base product is computed once for all rows; other layers run once for each
    adapter, on its rows. Gradients reach the factors of every adapter that is named. The model must
    not be merged; inside, it has no active adapter.

    Args:
        model: A model with adapters (`lightning_lora.add_adapter`).
        names: The adapter of each row, ``"__base__"`` for none. Every batch inside must have as
            many rows, in the first dimension of every adapted layer's input; beam search
            multiplies them, and needs each name as often as there are beams.

    Raises:
        ConfigError: An unknown adapter; one with magnitudes, with parameters or rows of embeddings
            trained in place, or on `torch.nn.MultiheadAttention` or experts; a merged model; a
            batch of another size.

    Example:
        >>> from lightning_lora import add_adapter
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> plan = add_adapter(model, "first", r=1, alpha=2, target_modules=["0"])
        >>> with torch.no_grad(), adapter_per_row(model, ["first", "__base__"]):
        ...     model(torch.ones(2, 2)).shape
        torch.Size([2, 2])
    """
    used = {name: adapter_of(model, name) for name in dict.fromkeys(names) if name != BASE}
    for name, adapter in used.items():
        _check(name, adapter)
    places: dict[str, Tensor] = {
        name: torch.tensor([row for row, own in enumerate(names) if own == name])
        for name in dict.fromkeys(names)
    }
    targets: dict[str, Target] = {}
    for adapter in used.values():
        for target in adapter.record.plan.targets:
            # Layers that share factors are known by them; each has its rows here.
            targets.setdefault(target.name, replace(target, tied_to=None))
    with alone(model):
        if not targets:
            yield
            return
        rows: dict[str, nn.Module] = {
            layer: _RowFactors(
                layer,
                {n: each.factors[layer] for n, each in used.items() if layer in each.factors},
                places,
            )
            for layer in targets
        }
        record = _record(model, tuple(targets.values()))
        attach(model, record, rows, {})
        try:
            yield
        finally:
            record.by_row = False
            remove_lora(model)


class _RowFactors(nn.Module):
    """Stands in the place of a layer's factors and runs its update with those of each row.

    Args:
        layer: The layer's name.
        factors: The factors of each adapter that the layer has.
        places: The rows of each name, ``"__base__"`` among them.
    """

    magnitude = None

    def __init__(
        self, layer: str, factors: dict[str, nn.Module], places: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.layer = layer
        self.count = sum(map(len, places.values()))
        self.factors = nn.ModuleList(factors.values())
        self.places = [places[name] for name in factors]
        rest = [rows for name, rows in places.items() if name not in factors]
        self.rest = torch.cat(rest) if rest else None

    def forward(self, update: Callable[..., Tensor], x: Tensor, *inputs: Any) -> Tensor:
        """As `LoRAFactors.forward`, row by row."""
        if x.ndim == 0 or len(x) != self.count:
            raise ConfigError(
                f"adapter_per_row names {self.count} rows, and the input of {self.layer!r} has "
                f"{len(x) if x.ndim else 0} in its first dimension. Name one adapter for each row "
                "of the batch; generate with num_beams or num_return_sequences multiplies the rows "
                "and needs each name as often, one after the other. A layer that folds the batch "
                "into another dimension cannot be adapted by rows."
            )
        if update is lora_linear:
            return self._linear(x, *inputs)
        # By groups through the layer's own way; what no adapter has goes with zero factors.
        parts, order = [], []
        for rows, lora in zip(self.places, self.factors, strict=True):
            parts.append(self._run(lora, update, x[rows.to(x.device)], *inputs))
            order.append(rows)
        if self.rest is not None:
            first: Any = self.factors[0]
            A, B = (torch.zeros_like(factor) for factor in first.pair())
            parts.append(update(x[self.rest.to(x.device)], *inputs, A, B, 1.0, 0.0))
            order.append(self.rest)
        back = torch.cat(order).argsort().to(x.device)
        return torch.cat(parts)[back]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, weight, bias)
        for rows, lora in zip(self.places, self.factors, strict=True):
            rows = rows.to(x.device)
            own = self._run(lora, _update_alone, x[rows], out.dtype)
            out = out.index_add(0, rows, own)
        return out

    def _run(
        self, lora: nn.Module, update: Callable[..., Tensor], x: Tensor, *inputs: Any
    ) -> Tensor:
        out: Tensor = lora(update, x, *inputs)
        return out


def _update_alone(
    x: Tensor, dtype: torch.dtype, A: Tensor, B: Tensor, scaling: float, dropout: float
) -> Tensor:
    hidden = F.linear(F.dropout(x.to(dtype), dropout), A.to(dtype))
    return F.linear(hidden, B.to(dtype)) * scaling


def _check(name: str, adapter: Waiting) -> None:
    record = adapter.record
    trained = [parameter.name for parameter in record.plan.trained]
    why = None
    refused = [t.name for t in record.plan.targets if t.kind.endswith(_REFUSED)]
    if record.config.use_dora:
        why = "has magnitudes (use_dora), which scale the base's output too"
    elif trained:
        why = f"trains base parameters in place ({listed(trained, limit=3)})"
    elif record.plan.tokens:
        why = "trains rows of embeddings (trainable_token_indices)"
    elif refused:
        why = f"adapts {refused[0]!r}, whose weights are read instead of called"
    if why is not None:
        raise ConfigError(
            f"The adapter {name!r} {why}, so it cannot run on some rows of a batch alone. Run its "
            "rows as a batch of their own, after set_adapter."
        )


def _record(model: nn.Module, targets: tuple[Target, ...]) -> Injection:
    return Injection(
        config=LoRAConfig(),
        plan=Plan(targets, (), (), (), (), 0),
        requires_grad=frozenset(
            clean_name(name) for name, p in model.named_parameters() if p.requires_grad
        ),
        buffers=persistent_buffers(model),
        by_row=True,
    )
