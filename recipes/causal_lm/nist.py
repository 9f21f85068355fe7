"""NIST as NIST's own script and E2E's compute it, with several references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]


def corpus_nist(texts: Sequence[Words], references: Sequence[Sequence[Words]], n: int = 5) -> float:
    """Return the NIST score of texts in words (Doddington 2002, HLT).

    An n-gram counts if any reference of its text has it, and texts are compared in length with the
    mean of their references, as in `mteval-v13a.pl` and in E2E's `measure_scores.py`. (`nltk` takes
    the n-grams of one reference only, the best, and comes to less where there are several.)

    Args:
        texts: What was generated.
        references: For each text one or more references.
        n: Longest n-grams.

    Example:
        >>> round(corpus_nist(["a b".split()], [["a c".split(), "d b".split()]], n=1), 4)
        2.0
    """
    known: list[Counter[Words]] = [Counter() for _ in range(n + 1)]
    hits: list[Counter[Words]] = [Counter() for _ in range(n + 1)]
    lengths = [0] * (n + 1)
    expected = 0.0
    for text, several in zip(texts, references, strict=True):
        known[0][()] += sum(map(len, several))
        expected += sum(map(len, several)) / len(several)
        for order in range(1, n + 1):
            any_of: Counter[Words] = Counter()
            for reference in several:
                found = _ngrams(reference, order)
                known[order].update(found)
                any_of |= found
            own = _ngrams(text, order)
            hits[order].update(own & any_of)
            lengths[order] += own.total()
    score = 0.0
    for order in range(1, n + 1):
        information = (
            count * math.log2(known[order - 1][ngram[:-1]] / known[order][ngram])
            for ngram, count in hits[order].items()
        )
        score += sum(information) / lengths[order] if lengths[order] else 0.0
    return score * _brevity(lengths[1], expected)


def _ngrams(words: Words, order: int) -> Counter[Words]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _brevity(length: int, expected: float) -> float:
    """Half where a text has two thirds of the words that it should have."""
    if not length or not expected:
        return 0.0
    return math.exp(math.log(0.5) * (math.log(min(1.0, length / expected)) / math.log(1.5)) ** 2)
