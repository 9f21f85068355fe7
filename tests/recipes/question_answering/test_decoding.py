"""The best answers against a search through all spans in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lora.recipes.question_answering.batches import WindowCollator
from lightning_lora.recipes.question_answering.decoding import (
    Candidate,
    Prediction,
    best_spans,
    decode,
    gather_records,
    span_losses,
    window_records,
)
from lightning_lora.recipes.question_answering.windows import (
    NO_LABEL,
    Layout,
    tokenize_pairs,
    windows_of,
)
from tests.recipes.question_answering.material import word_tokenizer

WORDS = [f"w{number}" for number in range(20)]


def _allowed_spans(allowed: torch.Tensor, max_answer_length: int) -> list[tuple[int, int]]:
    places = allowed.nonzero().flatten().tolist()
    return [
        (first, last)
        for first in places
        for last in places
        if first <= last < first + max_answer_length
    ]


@pytest.mark.parametrize("n_best", [1, 5, 300])
@pytest.mark.parametrize("max_answer_length", [1, 4, 100])
def test_spans_are_the_best_of_all_allowed(n_best: int, max_answer_length: int) -> None:
    torch.manual_seed(n_best + max_answer_length)
    start, end = torch.randn(2, 6, 13)
    # The highest logits lie outside: at CLS, in the question, and in the padding.
    start[:, :3] += 20
    end[:, -2:] += 20
    allowed = torch.zeros(6, 13, dtype=torch.bool)
    for window, (low, high) in enumerate(((3, 11), (4, 9), (3, 4), (5, 5), (3, 6), (6, 11))):
        allowed[window, low:high] = True
    scores, first, last = best_spans(start, end, allowed, n_best, max_answer_length)
    assert scores.shape == first.shape == last.shape == (6, n_best)
    assert first.min() >= 0 and last.max() < 13, "also where a window has fewer spans"
    for window in range(6):
        expected = sorted(
            (
                (float(start[window, a] + end[window, b]), a, b)
                for a, b in _allowed_spans(allowed[window], max_answer_length)
            ),
            reverse=True,
        )[:n_best]
        found = [
            (score, a, b)
            for score, a, b in zip(
                scores[window].tolist(), first[window].tolist(), last[window].tolist(), strict=True
            )
            if score > -math.inf
        ]
        assert [span[1:] for span in found] == [span[1:] for span in expected]
        assert [span[0] for span in found] == pytest.approx([span[0] for span in expected])


def test_the_best_span_need_not_begin_at_one_of_the_best_starts() -> None:
    """What a search among the n best starts and ends misses: the best starts come after all ends
    that are any good.
    """
    start = torch.tensor([[1.0, 0.0, 8.0, 9.0]])
    end = torch.tensor([[5.0, 0.0, -9.0, -9.0]])
    _, first, last = best_spans(start, end, torch.ones(1, 4, dtype=torch.bool), 1, 4)
    assert (int(first), int(last)) == (0, 0)


def test_losses_are_those_of_the_model() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = BertForQuestionAnswering(config).eval()
    tokens = torch.randint(0, 30, (4, 9))
    start, end = torch.tensor([0, 3, 2, 5]), torch.tensor([0, 4, 2, 8])
    outputs = model(input_ids=tokens, start_positions=start, end_positions=end)
    losses = span_losses(outputs.start_logits, outputs.end_logits, {"start": start, "end": end})
    assert losses.shape == (4,)
    assert losses.mean().item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    start[1] = end[1] = NO_LABEL
    # The model leaves out what lies behind the last token.
    beyond = torch.where(start == NO_LABEL, 99, start), torch.where(end == NO_LABEL, 99, end)
    outputs = model(input_ids=tokens, start_positions=beyond[0], end_positions=beyond[1])
    losses = span_losses(outputs.start_logits, outputs.end_logits, {"start": start, "end": end})
    assert losses[1].item() == 0
    assert losses.sum().item() / 3 == pytest.approx(outputs.loss.item(), rel=1e-6)
    half = span_losses(*torch.randn(2, 4, 9).bfloat16(), {"start": start, "end": end})
    assert half.dtype is torch.float32


def test_losses_do_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 2, 5)
    labels = {"start": torch.tensor([1, 0]), "end": torch.tensor([3, 0])}
    alone = span_losses(start, end, labels)
    padded = {name: values + 2 for name, values in labels.items()}
    padded["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]).repeat(2, 1)
    wide = [torch.nn.functional.pad(logits, (2, 1), value=5.0) for logits in (start, end)]
    torch.testing.assert_close(span_losses(*wide, padded), alone)


def _batch(side: str = "right") -> tuple[dict[str, torch.Tensor], list[str]]:
    """Two questions: the first in four windows, the second in one."""
    tokenizer = word_tokenizer([*WORDS, "q"], padding_side=side)
    contexts = [" ".join(WORDS), "w3 w4 w5"]
    layout = Layout(13, 5, 4)
    rows: list[dict[str, Any]] = []
    for row, pair in enumerate(tokenize_pairs(tokenizer, ["q", "q"], contexts, 4)):
        for window in windows_of(pair, layout, None, labelled=True):
            rows.append({**window, "example": row, "window": len(rows)})
    assert len(rows) == 5
    return WindowCollator(tokenizer)(rows), contexts


def _logits(
    batch: dict[str, torch.Tensor], contexts: list[str], wanted: dict[tuple[int, str], float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that give the tokens of these windows these scores, half at start and half at end."""
    logits = torch.full(batch["input_ids"].shape, -5.0)
    for (window, word), score in wanted.items():
        if word == "CLS":
            place = int(batch["cls"][window])
        else:
            context = contexts[int(batch["example"][window])]
            begin = context.split().index(word)
            character = len(" ".join(context.split()[:begin])) + (begin > 0)
            place = int((batch["offset_starts"][window] == character).nonzero())
        logits[window, place] = score / 2
    return logits, logits.clone()


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_the_best_over_all_windows_of_a_question(side: str) -> None:
    batch, contexts = _batch(side)
    wanted = {
        (0, "w1"): 4.0,
        (1, "w6"): 6.0,
        (2, "w11"): 3.0,
        (3, "w18"): 5.0,
        (4, "w4"): 2.0,
        **{(window, "CLS"): 10.0 + window for window in (1, 2, 3, 0)},
        (4, "CLS"): -1.0,
    }
    records = window_records(*_logits(batch, contexts, wanted), batch, 3, 30)
    assert records["score"].shape == (5, 3)
    assert not any(isinstance(values, torch.Tensor) for values in records.values())
    first, second = decode(gather_records([records]), contexts, n_best=4)
    assert first.row == 0 and second.row == 1
    assert [candidate.text for candidate in first.candidates[:3]] == ["w6", "w18", "w1"]
    assert [candidate.score for candidate in first.candidates[:3]] == [6.0, 5.0, 4.0]
    assert len(first.candidates) == 4
    # The lowest over the windows, as in the script of transformers.
    assert first.null_score == 10.0
    assert first.no_answer_score == 4.0
    assert second.best == "w4"
    assert second.no_answer_score == -3.0
    assert first.answer(None) == first.answer(4.0) == "w6"
    assert first.answer(3.9) == ""
    assert second.answer(-3.5) == ""


def test_a_span_that_two_windows_hold_counts_once_with_its_higher_score() -> None:
    batch, contexts = _batch()
    wanted = {(0, "w7"): 4.0, (1, "w7"): 6.0, (1, "w6"): 5.0}
    records = window_records(*_logits(batch, contexts, wanted), batch, 20, 1)
    (first, _) = decode(gather_records([records]), contexts, n_best=20)
    texts = [candidate.text for candidate in first.candidates]
    assert texts[:2] == ["w7", "w6"]
    assert sorted(texts) == sorted(WORDS)
    assert first.candidates[0] == Candidate("w7", 21, 23, 6.0)


def test_windows_of_several_batches_and_repeated_ones_are_counted_once() -> None:
    batch, contexts = _batch()
    torch.manual_seed(3)
    start, end = torch.randn(2, *batch["input_ids"].shape)
    whole = decode(gather_records([window_records(start, end, batch, 5, 3)]), contexts, 5)
    parts = []
    for places in ([4, 2], [0], [2, 3, 1]):
        part = {name: values[places] for name, values in batch.items()}
        parts.append(window_records(start[places], end[places], part, 5, 3))
    gathered = gather_records(parts)
    assert gathered["window"].tolist() == [0, 1, 2, 3, 4]
    assert decode(gathered, contexts, 5) == whole
    assert gather_records([]) == {}
    assert decode({}, contexts, 5) == []


def test_losses_are_kept_for_labelled_windows_only() -> None:
    batch, _ = _batch()
    batch["start"][1] = batch["end"][1] = NO_LABEL
    start, end = torch.randn(2, *batch["input_ids"].shape)
    losses = window_records(start, end, batch, 2, 3)["loss"]
    assert np.isnan(losses).tolist() == [False, True, False, False, False]
    del batch["start"]
    assert "loss" not in window_records(start, end, batch, 2, 3)


def test_a_model_that_has_diverged_gives_no_answer() -> None:
    batch, contexts = _batch()
    logits = torch.full(batch["input_ids"].shape, torch.nan)
    found = decode(gather_records([window_records(logits, logits, batch, 3, 3)]), contexts, 3)
    assert [prediction.best for prediction in found] == ["", ""]
    assert Prediction(0, [], 1.0).no_answer_score == math.inf
