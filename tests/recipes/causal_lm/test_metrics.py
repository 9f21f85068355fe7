"""Scores of generated texts are the libraries', over the corpus, with several references."""

from __future__ import annotations

import math

import pytest
import sacrebleu
from nltk.translate.nist_score import corpus_nist
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.causal_lm.metrics import check_metrics, score_texts

TEXTS = [
    "Cocum is a cheap coffee shop, near the river.",
    "The Eagle serves Chinese food in the city centre.",
    "Aromi has low prices and it's family-friendly.",
]
REFERENCES = [
    ["Cocum is a cheap coffee shop near the river.", "Near the river there is a cheap Cocum."],
    ["In the city centre, The Eagle serves Chinese food."],
    ["Aromi is cheap.", "Aromi is family-friendly with low prices.", "A cheap place is Aromi."],
]
ALL = ["bleu", "nist", "rouge_l", "chrf", "nist_mteval"]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    first = [each[0] for each in REFERENCES]
    second = [REFERENCES[0][1], None, REFERENCES[2][1]]
    third = [None, None, REFERENCES[2][2]]
    scores = score_texts(ALL, TEXTS, REFERENCES)
    assert list(scores) == ALL
    assert scores["bleu"] == sacrebleu.corpus_bleu(TEXTS, [first, second, third]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(TEXTS, [first, second, third]).score
    assert 20 < scores["bleu"] < 80
    # Over the corpus, which is not the mean of its sentences' scores; all references count.
    alone = [score_texts(["bleu"], [t], [r])["bleu"] for t, r in zip(TEXTS, REFERENCES)]  # noqa: B905
    assert abs(sum(alone) / 3 - scores["bleu"]) > 0.5
    assert score_texts(["bleu"], TEXTS, [[r] for r in first])["bleu"] < scores["bleu"]


def test_nist_is_nltks_on_bleus_tokens() -> None:
    tokenize = Tokenizer13a()
    expected = corpus_nist(
        [[tokenize(text).split() for text in each] for each in REFERENCES],
        [tokenize(text).split() for text in TEXTS],
    )
    found = score_texts(["nist"], TEXTS, REFERENCES)["nist"]
    assert found == expected > 1
    # Punctuation is apart from words.
    assert found != corpus_nist(
        [[text.split() for text in each] for each in REFERENCES], [text.split() for text in TEXTS]
    )


def test_mtevals_nist_is_nltks_with_one_reference_and_more_with_several() -> None:
    single = [[each[0]] for each in REFERENCES]
    one = score_texts(["nist", "nist_mteval"], TEXTS, single)
    assert one["nist_mteval"] == pytest.approx(one["nist"])
    # By hand: 4 words in references, "a" and "b" once each: log2(4) for both hits of 2 words; of
    # bigrams none.
    several = score_texts(["nist", "nist_mteval"], ["a b"], [["a c", "d b"]])
    assert several == {"nist": 1, "nist_mteval": 2}
    # Half for two thirds of the words: "a b" against three words, log2(3) for each.
    short = score_texts(["nist_mteval"], ["a x"], [["a c d"]])["nist_mteval"]
    assert short == pytest.approx(math.log2(3) / 2 * 0.5)


def test_rouge_takes_the_longest_common_subsequence_with_the_best_reference() -> None:
    # a c d of "a b c d" (3 of 4) against "a c d e" (3 of 4): F1 .75; the other reference is worse.
    found = score_texts(["rouge_l"], ["a b c d", "a b"], [["x y", "a c d e"], ["a b"]])
    assert found["rouge_l"] == pytest.approx(100 * (0.75 + 1) / 2)


def test_case_counts_unless_told_otherwise() -> None:
    shouted = [text.upper() for text in TEXTS]
    for name in ("bleu", "nist"):
        exact = score_texts([name], TEXTS, REFERENCES, lowercase=True)[name]
        assert score_texts([name], shouted, REFERENCES, lowercase=True)[name] == exact
        assert score_texts([name], shouted, REFERENCES)[name] < exact / 2


def test_empty_and_short_texts_have_scores() -> None:
    scores = score_texts(ALL, ["", "food"], [["Indian food"], ["food"]])
    assert all(value >= 0 for value in scores.values())
    assert set(score_texts(ALL, [""], [["food"]]).values()) == {0.0}


def test_unknown_metrics_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'rougeL' \(did you mean 'rouge_l'\?\)"):
        check_metrics(["bleu", "rougeL"])
    with pytest.raises(
        ConfigError, match=r"no metric 'meteor'.*bleu, nist, nist_mteval, rouge_l, chrf; perpl"
    ):
        check_metrics(["meteor"])
