"""Metrics of classification by the names that configs give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.classification.problems import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from lightning_lora.recipes.files import nearest


class PositiveF1Score(BinaryF1Score):
    """F1 of the second of two classes, which GLUE reports for MRPC and QQP."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take probabilities `[B, 2]` and class numbers `[B]`."""
        super().update(preds.argmax(dim=-1), target)


_SINGLE: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "balanced_accuracy": lambda classes: MulticlassAccuracy(classes, average="macro"),
    "f1": lambda classes: MulticlassF1Score(classes, average="macro"),
    "f1_positive": lambda classes: PositiveF1Score(),
    "precision": lambda classes: MulticlassPrecision(classes, average="macro"),
    "recall": lambda classes: MulticlassRecall(classes, average="macro"),
    "matthews": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "auroc": lambda classes: MulticlassAUROC(classes),
}
_MULTI: dict[str, Callable[[int], Metric]] = {
    "f1": lambda classes: MultilabelF1Score(classes, average="macro"),
    "f1_micro": lambda classes: MultilabelF1Score(classes, average="micro"),
    "exact_match": lambda classes: MultilabelExactMatch(classes),
    "accuracy": lambda classes: MultilabelAccuracy(classes, average="micro"),
    "precision": lambda classes: MultilabelPrecision(classes, average="macro"),
    "recall": lambda classes: MultilabelRecall(classes, average="macro"),
    "auroc": lambda classes: MultilabelAUROC(classes),
}
_REGRESSION: dict[str, Callable[[int], Metric]] = {
    "pearson": lambda _: PearsonCorrCoef(),
    "spearman": lambda _: SpearmanCorrCoef(),
    "mse": lambda _: MeanSquaredError(),
    "mae": lambda _: MeanAbsoluteError(),
    "r2": lambda _: R2Score(),
}
_KNOWN = {SINGLE_LABEL: _SINGLE, MULTI_LABEL: _MULTI, REGRESSION: _REGRESSION}
_DEFAULTS = {
    SINGLE_LABEL: ["accuracy", "f1"],
    MULTI_LABEL: ["f1_micro", "f1", "exact_match"],
    REGRESSION: ["pearson", "spearman", "mse"],
}
_SMALLER_IS_BETTER = {"mse", "mae"}


def metric_names(names: Sequence[str] | None, problem: str) -> list[str]:
    """Return the metrics to compute: those that are named, else the usual ones of the problem.

    Args:
        names: Names from the settings; None for the usual ones.
        problem: The problem type.

    Raises:
        ConfigError: If a name is unknown, or there is none.

    Example:
        >>> metric_names(None, "regression")
        ['pearson', 'spearman', 'mse']
    """
    if names is None:
        return list(_DEFAULTS[problem])
    known = _KNOWN[problem]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wanted = f"has no metric {unknown[0]!r}{nearest(unknown[0], known)}" if unknown else "is []"
        raise ConfigError(
            f"model.metrics {wanted}; for {problem} there are: {', '.join(sorted(known))}."
        )
    return list(names)


def mode_of(metric: str) -> str:
    """Return `"min"` for metrics whose smaller values are better, else `"max"`."""
    return "min" if metric in _SMALLER_IS_BETTER else "max"


def build_metrics(names: Sequence[str], problem: str, classes: int) -> MetricCollection:
    """Build metrics that take predictions as from `predictions_of`, and labels.

    Args:
        names: Metrics, as from `metric_names`.
        problem: The problem type.
        classes: How many classes there are.

    Raises:
        ConfigError: If a metric asks for another number of classes.
    """
    if "f1_positive" in names and classes != 2:
        raise ConfigError(
            f"model.metrics has 'f1_positive', which is for two classes; there are {classes}."
        )
    return MetricCollection({name: _KNOWN[problem][name](classes) for name in names})
