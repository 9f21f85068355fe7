"""Losses and predictions of each kind of problem, and the metrics by name."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.classification.metrics import build_metrics, metric_names, mode_of
from lightning_lora.recipes.classification.problems import check_problem, loss_of, predictions_of

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def test_a_regression_does_not_compare_every_row_with_every_other() -> None:
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 3.0])
    assert loss_of(REGRESSION, logits, labels) == 0
    assert predictions_of(REGRESSION, logits).tolist() == [1.0, 3.0]


def test_each_label_of_several_counts_on_its_own() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    shares = logits.sigmoid()[0]
    by_hand = -(shares[0].log() + (1 - shares[1]).log() + shares[2].log()) / 3
    assert torch.allclose(loss_of(MULTI, logits, labels), by_hand)
    assert torch.allclose(predictions_of(MULTI, logits), logits.sigmoid())


def test_smoothing_spreads_a_share_of_the_label() -> None:
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    logs = logits.log_softmax(-1)[0]
    by_hand = -(0.95 * logs[0] + 0.05 * logs[1])
    assert torch.allclose(loss_of(SINGLE, logits, labels, smoothing=0.1), by_hand)
    assert float(predictions_of(SINGLE, logits).sum()) == pytest.approx(1)


def test_metrics_agree_with_their_definitions() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 0, 1, 1])  # predicted 0 1 1 0 1: tp 2, fp 1, fn 1, tn 1
    metrics = build_metrics(["accuracy", "f1_positive", "f1", "matthews"], SINGLE, 2)
    found = {name: float(value) for name, value in metrics(probabilities, labels).items()}
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1_positive"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)

    values, truth = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 9.0])
    found = {
        name: float(value)
        for name, value in build_metrics(["pearson", "spearman", "mse"], REGRESSION, 1)(
            values, truth
        ).items()
    }
    assert found["pearson"] == pytest.approx(
        float(torch.corrcoef(torch.stack([values, truth]))[0, 1])
    )
    assert found["spearman"] == pytest.approx(0.5, abs=1e-5)
    assert found["mse"] == pytest.approx(9.0)

    several = build_metrics(["exact_match", "f1_micro"], MULTI, 3)
    found = {
        name: float(value)
        for name, value in several(
            torch.tensor([[0.9, 0.2, 0.8], [0.6, 0.4, 0.1]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
        ).items()
    }
    assert found == {"exact_match": 0.5, "f1_micro": pytest.approx(2 * 3 / (2 * 3 + 0 + 1))}


def test_names_are_checked_against_the_problem() -> None:
    assert metric_names(["mse"], REGRESSION) == ["mse"]
    assert (mode_of("mse"), mode_of("pearson")) == ("min", "max")
    with pytest.raises(ConfigError, match=r"'acuracy' \(did you mean 'accuracy'\?\)"):
        metric_names(["acuracy"], SINGLE)
    with pytest.raises(ConfigError, match="for regression there are: mae, mse"):
        metric_names(["accuracy"], REGRESSION)
    with pytest.raises(ConfigError, match=r"is \[\]"):
        metric_names([], SINGLE)
    with pytest.raises(ConfigError, match="for two classes; there are 3"):
        build_metrics(["f1_positive"], SINGLE, 3)
    with pytest.raises(ConfigError, match=r"did you mean 'regression'"):
        check_problem("regresion", "data.problem_type")
