"""Windows, their borders and their labels, against what can be counted by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.question_answering.batches import WindowCollator
from lightning_lora.recipes.question_answering.windows import (
    NO_LABEL,
    Layout,
    checked_layout,
    token_range,
    tokenize_pairs,
    window_ranges,
    windows_of,
)
from tests.recipes.question_answering.material import TEMPLATES, word_tokenizer

WORDS = [f"w{number}" for number in range(12)]
QUESTION = "q0 q1"


def _tokenizer(template: str = "bert", **settings: Any) -> Any:
    return word_tokenizer([*WORDS, "q0", "q1", "q2"], template, **settings)


def _windows(
    tokenizer: Any, context: str, span: tuple[int, int] | None, layout: Layout, **settings: Any
) -> list[dict[str, Any]]:
    (pair,) = tokenize_pairs(tokenizer, [QUESTION], [context], layout.max_question_length)
    options = {"labelled": True, **settings}
    return [
        {**window, "example": 0, "window": number}
        for number, window in enumerate(windows_of(pair, layout, span, **options))
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_windows_that_hold_a_whole_answer_point_at_it(template: str, side: str) -> None:
    """Every span of contexts of every length, in windows of several sizes and overlaps, padded."""
    tokenizer = _tokenizer(template, padding_side=side)
    collate = WindowCollator(tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    pointed, silent = 0, 0
    for length in range(1, 13):
        context = "  ".join(WORDS[:length])
        for room, overlap in ((3, 1), (4, 3), (5, 0), (20, 2)):
            layout = Layout(room + 2 + special, overlap, 2)
            ranges = window_ranges(length, room, overlap)
            for first in range(length):
                for last in range(first, length):
                    begin = context.index(WORDS[first])
                    finish = context.index(WORDS[last]) + len(WORDS[last])
                    answer = context[begin:finish]
                    rows = _windows(tokenizer, context, (begin, finish), layout)
                    assert len(rows) == len(ranges)
                    batch = {name: value.numpy() for name, value in collate(rows).items()}
                    for number, (low, high) in enumerate(ranges):
                        start, end = batch["start"][number], batch["end"][number]
                        if low <= first and last < high:
                            characters = (
                                batch["offset_starts"][number, start],
                                batch["offset_ends"][number, end],
                            )
                            assert context[slice(*characters)] == answer
                            pointed += 1
                        else:
                            assert start == end == batch["cls"][number]
                            silent += 1
                        marked = batch["input_ids"][number, batch["cls"][number]]
                        if template == "gpt":
                            # The first token that is no padding stands in for CLS.
                            first_token = batch["attention_mask"][number].argmax()
                            assert batch["cls"][number] == first_token
                        else:
                            assert marked == tokenizer.cls_token_id
    assert pointed > 500 and silent > 500


def test_windows_cover_the_context_and_overlap_as_asked() -> None:
    for tokens in range(1, 15):
        for room in range(1, 6):
            for overlap in range(room):
                ranges = window_ranges(tokens, room, overlap)
                covered = {place for low, high in ranges for place in range(low, high)}
                assert covered == set(range(tokens))
                assert all(high - low == room for low, high in ranges[:-1])
                for before, after in pairwise(ranges):
                    assert before[1] - after[0] == overlap
                    assert after[1] > before[1], "holds something new"


@pytest.mark.parametrize("template", ["bert", "roberta"])
def test_windows_are_those_of_transformers(template: str) -> None:
    tokenizer = _tokenizer(template)
    context = " ".join(WORDS)
    rows = _windows(tokenizer, context, None, Layout(10, 2, 2))
    expected = tokenizer(
        QUESTION,
        context,
        truncation="only_second",
        max_length=10,
        stride=2,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert len(rows) == len(expected["input_ids"]) > 2
    for number, row in enumerate(rows):
        assert row["input_ids"] == expected["input_ids"][number]
        if template == "bert":  # RoBERTa's are not used
            assert row["token_type_ids"] == expected["token_type_ids"][number]
        place = row["context_start"]
        ends = [end for _, end in expected["offset_mapping"][number]]
        assert row["offset_ends"].tolist() == ends[place : place + len(row["offset_ends"])]


def test_long_questions_are_cut_and_counted() -> None:
    tokenizer = _tokenizer()
    (pair,) = tokenize_pairs(tokenizer, ["  q0 q1 q2 q1"], ["w3 w4"], 3)
    assert pair.cut == 1
    assert tokenizer.decode(pair.prefix) == "[CLS] q0 q1 q2 [SEP]"
    assert tokenizer.decode(pair.context) == "w3 w4"
    assert pair.prefix_types == [0] * 5
    assert pair.starts.tolist() == [0, 3]


def test_an_answer_that_begins_within_a_token_takes_the_whole_token() -> None:
    starts, ends = np.array([0, 4, 9, 9, 12]), np.array([3, 8, 12, 12, 14])
    assert token_range(starts, ends, (5, 8)) == (1, 1)
    # Several tokens of one character, as of an emoji in bytes.
    assert token_range(starts, ends, (9, 12)) == (2, 3)
    # The blank before a token is in none.
    assert token_range(starts, ends, (3, 8)) == (1, 1)
    assert token_range(starts, ends, (8, 14)) == (2, 4)
    first, last = token_range(starts, ends, (3, 4))
    assert first > last


def test_what_no_token_holds_is_not_trained_on() -> None:
    tokenizer = _tokenizer()
    (row,) = _windows(tokenizer, "w1  w2", (3, 4), Layout(20, 2, 2))
    assert (row["start"], row["end"]) == (NO_LABEL, NO_LABEL)
    (row,) = _windows(tokenizer, "w1", None, Layout(20, 2, 2), labelled=False)
    assert (row["start"], row["end"]) == (NO_LABEL, NO_LABEL)
    batch = WindowCollator(_tokenizer(padding_side="left"))(
        [row, *_windows(tokenizer, "w1 w2 w3", None, Layout(20, 2, 2))]
    )
    assert batch["start"].tolist() == [NO_LABEL, 0]


def test_a_context_without_tokens_makes_one_window() -> None:
    tokenizer = _tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w5", "")
    (row,) = _windows(tokenizer, "w5", None, Layout(20, 2, 2))
    assert tokenizer.decode(row["input_ids"]) == "[CLS] q0 q1 [SEP] [SEP]"
    assert len(row["offset_starts"]) == 0
    assert WindowCollator(tokenizer)([row])["offset_starts"].tolist() == [[-1] * 5]


def test_batches_hold_what_the_model_takes_and_no_more() -> None:
    rows = _windows(_tokenizer(), " ".join(WORDS), (0, 2), Layout(10, 2, 2))
    assert "token_type_ids" in WindowCollator(_tokenizer("bert"))(rows)
    batch = WindowCollator(_tokenizer("roberta"))(rows)
    assert "token_type_ids" not in batch
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 10)
    assert batch["attention_mask"].sum(dim=1).tolist() == [10, 10, 10, 8]
    assert batch["input_ids"][-1, 8:].tolist() == [0, 0]


def test_windows_are_fitted_to_the_model_or_refused() -> None:
    tokenizer = _tokenizer(model_max_length=30)
    assert checked_layout(tokenizer, Layout(384, 10, 8)) == Layout(30, 10, 8)
    assert checked_layout(tokenizer, Layout(20, 8, 8)).max_length == 20
    with pytest.raises(ConfigError, match=r"Windows of 20 tokens leave 9 .* 3 special tokens"):
        checked_layout(tokenizer, Layout(20, 9, 8))
    with pytest.raises(ConfigError, match=r"30 tokens \(all that the model takes of 384\) leave 0"):
        checked_layout(tokenizer, Layout(384, 128, 64))

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="The tokenizer Slow does not say which characters"):
        checked_layout(Slow(), Layout(384, 128, 64))
