"""Scores against those of SQuAD's own scripts.

The figures were computed once with `evaluate-v2.0.py`, which is not shipped here.
"""

from __future__ import annotations

import numpy as np
import pytest

from lightning_lora.recipes.question_answering.metrics import (
    evaluate,
    evaluate_with_no_answers,
    exact_match,
    f1_score,
    normalize_answer,
)
from lightning_lora.recipes.question_answering.thresholds import average_precision, best_threshold

# prediction, references, exact match, F1
KNOWN = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"], 1, 1.0),
    ("the Denver Broncos!", ["Denver Broncos"], 1, 1.0),
    ("Broncos", ["Denver Broncos"], 0, 2 / 3),
    ("gold-themed", ["gold themed"], 0, 0.0),
    ("Ogród Saski", ["ogród saski"], 1, 1.0),
    ("24\u201310", ["24-10"], 0, 0.0),  # an en dash is no ASCII punctuation
    ("an a the", ["the"], 1, 1.0),
    ("theatre", ["atre"], 0, 0.0),
    ("to be or not to be", ["to be to be"], 0, 0.8),
    ("", [], 1, 1.0),
    ("something", [], 0, 0.0),
    ("", ["something"], 0, 0.0),
    ("Levi's Stadium in Santa Clara", ["Santa Clara, California", "Levi's Stadium"], 0, 4 / 7),
    ("$1,000 , 000", ["1000000"], 0, 0.0),
    ("$1,000,000", ["1000000"], 1, 1.0),
]


@pytest.mark.parametrize(("prediction", "references", "exact", "f1"), KNOWN)
def test_known_pairs(prediction: str, references: list[str], exact: int, f1: float) -> None:
    assert exact_match(prediction, references) == exact
    assert f1_score(prediction, references) == pytest.approx(f1, abs=1e-12)


def test_scores_are_those_of_torchmetrics() -> None:
    from torchmetrics.text import SQuAD

    pairs = [(text, right) for text, right, _, _ in KNOWN if right]
    metric = SQuAD()
    metric.update(
        [{"id": str(n), "prediction_text": text} for n, (text, _) in enumerate(pairs)],
        [
            {"id": str(n), "answers": {"text": right, "answer_start": [0] * len(right)}}
            for n, (_, right) in enumerate(pairs)
        ],
    )
    expected = {name: float(value) for name, value in metric.compute().items()}
    found = evaluate([text for text, _ in pairs], [right for _, right in pairs])
    assert found.pop("total") == len(pairs)
    assert found == pytest.approx(expected, abs=1e-4)
    assert 30 < found["exact_match"] < found["f1"] < 70


# Six questions, three of which have an answer: prediction, how much "no answer" scores above it,
# references.
MIXED = [
    ("Rome", -4.0, ["Rome"]),
    ("the old port", -1.0, ["old harbour"]),
    ("Oslo", 2.0, ["Oslo", "in Oslo"]),
    ("Lima", -2.0, []),
    ("Kyoto", 1.0, []),
    ("noon", 3.0, []),
]


def _mixed(threshold: float | None) -> dict[str, float]:
    texts, scores, references = zip(*MIXED, strict=True)
    return evaluate_with_no_answers(texts, scores, references, threshold)


def test_questions_without_answers_are_scored_as_by_the_official_script() -> None:
    at_zero = _mixed(0.0)
    # evaluate-v2.0.py --na-prob-thresh 0
    assert at_zero["exact_match"] == pytest.approx(50.0)
    assert at_zero["f1"] == pytest.approx(58.33333333333333)
    assert at_zero["has_answer_exact_match"] == pytest.approx(33.333333333333336)
    assert at_zero["has_answer_f1"] == pytest.approx(50.0)
    assert at_zero["no_answer_exact_match"] == pytest.approx(66.66666666666667)
    assert at_zero["no_answer_f1"] == pytest.approx(66.66666666666667)
    assert at_zero["total"] == 6
    assert at_zero["best_exact_match"] == pytest.approx(66.66666666666667)
    assert at_zero["best_f1"] == pytest.approx(66.66666666666667)
    assert at_zero["has_answer_ap"] == pytest.approx(75.55555555555556)
    # The script names -4, the score of the last question that is answered; up to -2 is the same.
    assert at_zero["best_exact_match_threshold"] == at_zero["best_f1_threshold"] == -3.0
    assert at_zero["threshold"] == 0.0


def test_without_a_threshold_the_best_is_taken() -> None:
    best = _mixed(None)
    assert best["threshold"] == best["best_f1_threshold"]
    assert best["f1"] == pytest.approx(best["best_f1"])
    assert best["f1_at_zero"] == pytest.approx(_mixed(0.0)["f1"])
    assert best["no_answer_f1"] == 100.0
    only = evaluate_with_no_answers(["x"], [1.0], [["x"]])
    assert "no_answer_f1" not in only and only["f1"] == 100.0
    none = evaluate_with_no_answers(["x"], [1.0], [[]])
    assert "has_answer_f1" not in none and "has_answer_ap" not in none and none["f1"] == 100.0


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_best(seed: int) -> None:
    draw = np.random.default_rng(seed)
    answered = draw.choice([0.0, 0.4, 1.0], 40)
    silent = draw.choice([0.0, 1.0], 40)
    # Rounded, so that some questions have equal scores.
    scores = draw.normal(size=40).round(1)

    def score(threshold: float) -> float:
        return float(np.where(scores > threshold, silent, answered).mean())

    best, place = best_threshold(answered, silent, scores)
    assert score(place) == pytest.approx(best, abs=1e-12)
    candidates = np.concatenate([[scores.min() - 1], scores])
    assert best == pytest.approx(max(map(score, candidates)), abs=1e-12)
    assert np.abs(scores - place).min() > 0.04, "no question lies on the threshold"


def test_thresholds_at_the_ends() -> None:
    scores = np.array([1.0, 2.0, np.inf])
    ones, zeros = np.ones(3), np.zeros(3)
    assert best_threshold(zeros, ones, scores) == (1.0, 0.0)
    best, place = best_threshold(np.array([1.0, 1.0, 0.0]), zeros, scores)
    assert best == pytest.approx(2 / 3)
    assert place == 3.0
    assert best_threshold(ones, zeros, np.array([1.0, 2.0, 5.0])) == (1.0, 6.0)
    # Nobody has a candidate: whatever the threshold, nothing is answered.
    assert best_threshold(zeros, zeros, np.full(3, np.inf)) == (0.0, 0.0)


def test_average_precision_is_that_of_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import binary_average_precision

    draw = np.random.default_rng(0)
    positive = draw.random(200) < 0.4
    scores = (draw.normal(size=200) - positive).round(1)
    expected = binary_average_precision(
        torch.sigmoid(torch.from_numpy(-scores)), torch.from_numpy(positive.astype(np.int64))
    )
    assert average_precision(positive, scores) == pytest.approx(float(expected), abs=1e-6)


def test_normalization_is_in_the_official_order() -> None:
    # Punctuation goes first, so that what is left may become an article.
    assert normalize_answer("T.H.E. end") == "end"
    assert normalize_answer("the-man") == "theman"
    assert normalize_answer(" An\tapple\n") == "apple"
