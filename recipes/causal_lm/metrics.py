"""Scores of generated texts against one or more references each, over a whole corpus.

The figures are those of `sacrebleu` (BLEU, chrF), `torchmetrics` (ROUGE-L) and `nltk` (NIST). E2E's
script ignores case, and its NIST is another, `nist_mteval`; on people's own texts for E2E's test
data it is 9.0 where nltk's is 7.9. Its ROUGE-L, which takes precision and recall from different
references, is about one point above this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.files import nearest

References = Sequence[Sequence[str]]


def bleu(texts: Sequence[str], references: References) -> float:
    """Return the corpus BLEU in per cent (sacrebleu, 13a tokenization).

    Args:
        texts: What was generated.
        references: For each text one or more references.

    Example:
        >>> bleu(["the cat sat on a mat"], [["a cat sat", "the cat sat on a mat"]])
        100.00000000000004
    """
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(texts), _streams(references)).score)


def chrf(texts: Sequence[str], references: References) -> float:
    """Return the corpus chrF2 in per cent (sacrebleu); the best reference counts."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(texts), _streams(references)).score)


def rouge_l(texts: Sequence[str], references: References) -> float:
    """Return the mean F1 of ROUGE-L in per cent (torchmetrics); the best reference counts."""
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(
        list(texts), [list(each) for each in references], accumulate="best", rouge_keys="rougeL"
    )
    return 100 * float(scores["rougeL_fmeasure"])


def nist(texts: Sequence[str], references: References) -> float:
    """Return the corpus NIST of 5-grams (nltk) of texts tokenized as for BLEU."""
    from nltk.translate.nist_score import corpus_nist  # type: ignore[import-untyped]

    hypotheses, targets = _words(texts, references)
    # Corpora too short for n-grams of some order have no precision of it.
    longest = min(5, max(map(len, hypotheses), default=0))
    return float(corpus_nist(targets, hypotheses, n=longest)) if longest else 0.0


def nist_mteval(texts: Sequence[str], references: References) -> float:
    """Return the corpus NIST of 5-grams as E2E's script has it, whose references all count."""
    from lightning_lora.recipes.causal_lm.nist import corpus_nist

    return corpus_nist(*_words(texts, references))


METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "bleu": bleu,
    "nist": nist,
    "nist_mteval": nist_mteval,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
DEFAULT_METRICS = ("bleu", "nist", "rouge_l", "chrf")


def check_metrics(names: Sequence[str]) -> list[str]:
    """Return names of metrics that are all known.

    Raises:
        ConfigError: If one is not; the nearest is named.

    Example:
        >>> check_metrics(["bleu", "chrf"])
        ['bleu', 'chrf']
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"model.metrics: there is no metric {name!r}{nearest(name, METRICS)}. There are "
                f"{', '.join(METRICS)}; perplexity is always reported."
            )
    return list(names)


def score_texts(
    names: Sequence[str], texts: Sequence[str], references: References, lowercase: bool = False
) -> dict[str, float]:
    """Return the metrics of generated texts.

    Args:
        names: Which of `METRICS`.
        texts: What was generated, one text or more.
        references: For each text one or more references.
        lowercase: Whether case does not matter, as in E2E's script.
    """
    if lowercase:
        texts = [text.lower() for text in texts]
        references = [[text.lower() for text in each] for each in references]
    return {name: METRICS[name](texts, references) for name in names}


def _words(
    texts: Sequence[str], references: References
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Divide texts into words as BLEU does."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    several = [[tokenize(text).split() for text in each] for each in references]
    return [tokenize(text).split() for text in texts], several


def _streams(references: References) -> list[Any]:
    """Turn the references of each text into sacrebleu's streams; None where there are fewer."""
    most = max(map(len, references))
    return [[each[n] if n < len(each) else None for each in references] for n in range(most)]
