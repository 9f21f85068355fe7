"""The three kinds of classification problems: what their losses and predictions are."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.files import nearest

# The names that `transformers` writes into a model's config.
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


def check_problem(name: str, setting: str) -> str:
    """Return the name of a problem type.

    Args:
        name: One of `PROBLEMS`.
        setting: The setting it is from, for the message.

    Raises:
        ConfigError: If there is no such type.
    """
    if name not in PROBLEMS:
        raise ConfigError(
            f"{setting} is {name!r}{nearest(name, PROBLEMS)}; give one of {', '.join(PROBLEMS)}."
        )
    return name


def loss_of(problem: str, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        problem: The problem type.
        logits: `[B, classes]`, or `[B, 1]` for a regression.
        labels: Class numbers `[B]`, a 0 or 1 for each class `[B, classes]`, or values `[B]`.
        smoothing: Share of each label that is spread over all classes.

    Returns:
        Cross entropy, binary cross entropy, or the mean squared error, a scalar.

    Example:
        >>> from torch import tensor
        >>> loss_of("regression", tensor([[1.0], [2.0]]), tensor([1.0, 4.0]))
        tensor(2.)
    """
    if problem == REGRESSION:
        # [B, 1] against [B] would be broadcast to every pair.
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    if problem == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def predictions_of(problem: str, logits: Tensor) -> Tensor:
    """Return the probability of each class `[B, classes]`, or the value `[B]` of a regression."""
    if problem == REGRESSION:
        return logits.squeeze(-1)
    return logits.sigmoid() if problem == MULTI_LABEL else logits.softmax(dim=-1)
