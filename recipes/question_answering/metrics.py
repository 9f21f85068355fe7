"""Exact match and F1 as the official SQuAD scripts compute them, in per cent.

Sources: `evaluate-v1.1.py` and `evaluate-v2.0.py` of https://rajpurkar.github.io/SQuAD-explorer/.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lightning_lora.recipes.question_answering.thresholds import average_precision, best_threshold

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Write a text in lower case, without ASCII punctuation, articles and superfluous blanks.

    >>> normalize_answer("The  Man's hat, a hat.")
    'mans hat hat'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the references, both normalized.

    Args:
        prediction: The predicted text; empty for "no answer".
        references: The right answers; none for a question without an answer.

    >>> exact_match("the rose", ["Rose!", "a tulip"]), exact_match("", []), exact_match("x", [])
    (1.0, 1.0, 0.0)
    """
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(text) for text in _scored(references)))


def f1_score(prediction: str, references: Sequence[str]) -> float:
    """Return the F1 of the words in common with the reference that has most of them.

    Args:
        prediction: The predicted text; empty for "no answer".
        references: The right answers; none for a question without an answer.

    >>> f1_score("a red rose", ["rose", "white tulips"])
    0.6666666666666666
    """
    words = normalize_answer(prediction).split()
    return max(_overlap(words, normalize_answer(text).split()) for text in _scored(references))


def score_questions(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact match and F1 of each question, from 0 to 1, each `[questions]`."""
    pairs = list(zip(predictions, references, strict=True))
    exact = np.array([exact_match(text, right) for text, right in pairs], dtype=np.float64)
    f1 = np.array([f1_score(text, right) for text, right in pairs], dtype=np.float64)
    return exact, f1


def evaluate(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score predictions where every question has an answer, as SQuAD 1.1 does.

    Args:
        predictions: The predicted texts.
        references: The right answers of each question.

    Returns:
        `exact_match` and `f1` in per cent, and `total`, the number of questions.

    Example:
        >>> evaluate(["Rome", "in May"], [["Rome"], ["May", "in the spring"]])
        {'exact_match': 50.0, 'f1': 83.33333333333333, 'total': 2}
    """
    exact, f1 = score_questions(predictions, references)
    return {"exact_match": _percent(exact), "f1": _percent(f1), "total": len(exact)}


def evaluate_with_no_answers(
    predictions: Sequence[str],
    no_answer_scores: Sequence[float],
    references: Sequence[Sequence[str]],
    threshold: float | None = None,
) -> dict[str, float]:
    """Score predictions where some questions have no answer, as SQuAD 2.0 does.

    Args:
        predictions: The best answer of each question, whether or not it is given.
        no_answer_scores: How much "no answer" scores above it.
        references: The right answers of each question; none where there is no answer.
        threshold: The answer is "no answer" where its score is higher; None takes the threshold
            with the best F1.

    Returns:
        In per cent `exact_match` and `f1`, the same with `has_answer_` and `no_answer_` in front
        for the two kinds of questions (of those there are), `best_exact_match` and `best_f1` with
        the best threshold for each (`..._threshold`), and `has_answer_ap`, the average precision of
        telling the two kinds apart. `threshold` is the one that was used, `f1_at_zero` the F1 at
        zero, `total` the number of questions.
    """
    scores = np.asarray(no_answer_scores, dtype=np.float64)
    answerable = np.array([bool(texts) for texts in references])
    exact, f1 = score_questions(predictions, references)
    answered = {"exact_match": exact, "f1": f1}
    silent = (~answerable).astype(np.float64)
    results: dict[str, float] = {}
    for name, values in answered.items():
        best, place = best_threshold(values, silent, scores)
        results[f"best_{name}"], results[f"best_{name}_threshold"] = 100 * best, place
    used = results["best_f1_threshold"] if threshold is None else threshold
    for name, values in answered.items():
        final = np.where(scores > used, silent, values)
        results[name] = _percent(final)
        for kind, chosen in (("has_answer", answerable), ("no_answer", ~answerable)):
            if chosen.any():
                results[f"{kind}_{name}"] = _percent(final[chosen])
    results["f1_at_zero"] = _percent(np.where(scores > 0, silent, f1))
    if answerable.any():
        results["has_answer_ap"] = 100 * average_precision(answerable, scores)
    return {**results, "threshold": used, "total": len(scores)}


def _scored(references: Sequence[str]) -> list[str]:
    """The references that are not empty once normalized; the empty text where there is none."""
    return [text for text in references if normalize_answer(text)] or [""]


def _overlap(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    precision, recall = common / len(words), common / len(right)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _percent(values: np.ndarray) -> float:
    return float(100 * values.mean())
