"""A recipe's model from its config alone, without weights, and a training step of it to meter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.metering import StepMemory, fake_model, meter_step
from lightning_lora.recipes.causal_lm.attention import accepts, without_cache
from lightning_lora.recipes.causal_lm.losses import CHUNK
from lightning_lora.recipes.causal_lm.module import CausalLM
from lightning_lora.recipes.classification.module import TextClassifier
from lightning_lora.recipes.classification.problems import REGRESSION
from lightning_lora.recipes.pretrained import position_limit, without_weights
from lightning_lora.recipes.recipe import RecipeModule

ASSUMED_CLASSES = 2


@dataclass(frozen=True)
class BatchShape:
    """The largest training batch of a rank.

    Attributes:
        rows: Rows.
        tokens: Tokens of each row.
        packed: Whether rows hold several examples.
    """

    rows: int
    tokens: int
    packed: bool = False


def build_empty(module: RecipeModule, datamodule: Any = None) -> list[str]:
    """Build a recipe's model on the meta device; no weights are read, nor data.

    Args:
        module: A recipe without a model yet.
        datamodule: Says what the settings leave open, where it knows without reading data.

    Returns:
        What had to be assumed, a sentence each.
    """
    notes = []
    if isinstance(module, TextClassifier):
        module.adopt(datamodule)
        if module.class_names is None and module.problem_type != REGRESSION:
            module.hparams["class_names"] = [str(number) for number in range(ASSUMED_CLASSES)]
            notes.append(
                f"The number of classes is known from the data only: {ASSUMED_CLASSES} are "
                "assumed. Set model.class_names to count with yours."
            )
    with without_weights():
        module.configure_model()
    if getattr(module.model.config, "pad_token_id", None) is None:
        # Models that classify a decoder's last token look for padding.
        module.model.config.pad_token_id = 0
    return notes


def largest_batch(module: RecipeModule, datamodule: Any) -> BatchShape:
    """Return the largest batch that a data module gives: full, and of the longest rows.

    Args:
        module: A recipe with its model.
        datamodule: Has `batch_size` and `max_length`.

    Raises:
        ConfigError: If it has not.
    """
    rows, tokens = getattr(datamodule, "batch_size", None), getattr(datamodule, "max_length", None)
    if not isinstance(rows, int) or not isinstance(tokens, int):
        raise ConfigError(
            "The plan counts with data.batch_size and data.max_length, which this data module has "
            "not. Use one of the recipes' data modules, or set both attributes in yours."
        )
    limit = position_limit(module.model.config)
    tokens = tokens if limit is None else min(tokens, limit)
    return BatchShape(rows, tokens, bool(getattr(datamodule, "packing", False)))


def meter(
    module: RecipeModule, batch: BatchShape, device: str, autocast: torch.dtype | None
) -> StepMemory | None:
    """Meter a training step of a recipe whose model is on the meta device.

    Args:
        module: A recipe with its model.
        batch: The shape of the batch.
        device: Whose kernels: `"cpu"` or `"cuda"`.
        autocast: What autocast computes in; None without.

    Returns:
        What it holds, or None where the model needs values to run, and not shapes alone.
    """
    for mask in _masks(batch):
        try:
            with fake_model(module, device):
                return meter_step(module, partial(_loss, module, batch, mask, autocast))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            continue  # needs the values of this mask, or of something else
    return None


def _masks(batch: BatchShape) -> Iterator[str]:
    if batch.packed:
        yield "full"
    elif batch.rows > 1:
        yield from ("padding", "full")
    yield "none"


def _loss(module: RecipeModule, batch: BatchShape, mask: str, dtype: torch.dtype | None) -> Tensor:
    shape = (batch.rows, batch.tokens)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if mask == "padding":
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    elif mask == "full":
        full = (batch.rows, 1, batch.tokens, batch.tokens)
        inputs["attention_mask"] = torch.ones(full, dtype=torch.bool)
    model = module.model
    if isinstance(module, CausalLM):
        inputs |= without_cache(model)
        if accepts(model, "logits_to_keep"):
            inputs["logits_to_keep"] = torch.zeros(batch.tokens - 1, dtype=torch.long)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return _objective(model(**inputs))


def _objective(outputs: Any) -> Tensor:
    if hasattr(outputs, "start_logits"):
        ends = (outputs.start_logits, outputs.end_logits)
        return sum((_LogitsLoss.apply(logits.float()) for logits in ends), torch.zeros(()))
    logits = outputs.logits
    loss: Tensor = _LogitsLoss.apply(logits if logits.ndim > 2 else logits.float())
    return loss


class _LogitsLoss(torch.autograd.Function):
    """Holds what the recipes' losses hold: the logits, their gradient, and a chunk in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        _work(logits)
        return logits.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        result = torch.zeros_like(logits)
        _work(logits)
        return result


def _work(logits: Tensor) -> tuple[Tensor, Tensor]:
    chunk = (min(CHUNK, logits.numel()),)
    first, second = (torch.empty(chunk, dtype=torch.float32) for _ in range(2))
    return first, second
