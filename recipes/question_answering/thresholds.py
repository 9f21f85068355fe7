"""When to give no answer: the best threshold, and how well scores tell questions apart."""

from __future__ import annotations

import numpy as np


def best_threshold(
    answered: np.ndarray, silent: np.ndarray, no_answer_scores: np.ndarray
) -> tuple[float, float]:
    """Find the threshold with the highest mean score, above which no answer is given.

    It is the search of SQuAD's `evaluate-v2.0.py` in one pass over the sorted questions. Among
    equally good thresholds the lowest is taken. Where that script returns the score of the last
    question that is answered, this is the middle between that and the next, which decides all
    questions alike and does not depend on rounding; questions of equal score stay together.

    Args:
        answered: Score of each question if its answer is given, `[questions]`.
        silent: Score if none is given, `[questions]`.
        no_answer_scores: How much "no answer" scores above the answer, `[questions]`.

    Returns:
        The mean score, and the threshold.

    Example:
        >>> right, wrong = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
        >>> best_threshold(right, wrong, np.array([-5.0, 3.0, 1.0]))
        (1.0, 2.0)
    """
    order = np.argsort(no_answer_scores, kind="stable")
    scores = no_answer_scores[order]
    gains = np.cumsum((answered - silent)[order])
    totals = silent.sum() + np.concatenate([[0.0], gains])
    # The threshold cannot lie between questions of equal score.
    totals[1:-1][scores[1:] == scores[:-1]] = -np.inf
    best = int(np.argmax(totals))
    return float(totals[best] / len(scores)), _between(scores, best)


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the average precision of ranking questions by their scores, lowest first.

    SQuAD's `pr_oracle_ap` where `positive` says which questions have an answer.

    Args:
        positive: Which questions are to come first, booleans `[questions]`, at least one.
        scores: `[questions]`.

    Example:
        >>> average_precision(np.array([True, False, True]), np.array([0.1, 0.2, 0.3]))
        0.8333333333333333
    """
    order = np.argsort(scores, kind="stable")
    found = np.cumsum(positive[order])
    # Precision and recall are known where the score changes.
    last = np.append(scores[order][1:] != scores[order][:-1], True)
    precision = (found / np.arange(1, len(found) + 1))[last]
    recall = found[last] / found[-1]
    return float(np.sum(precision * np.diff(recall, prepend=0.0)))


def _between(scores: np.ndarray, answered: int) -> float:
    """A threshold that lets that many of the sorted scores pass, away from their neighbours."""
    below = float(scores[answered - 1]) if answered else float(scores[0]) - 2.0
    above = float(scores[answered]) if answered < len(scores) else below + 2.0
    middle = (below + above) / 2
    if np.isfinite(middle):
        return middle
    return below + 1.0 if np.isfinite(below) else 0.0
