"""Questions and long contexts as overlapping windows of tokens, with answers as token positions.

All of it is arithmetic on one tokenization of each question with its whole context, so that a
window's border is known exactly and nothing depends on how tokenizers truncate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.errors import ConfigError

# What cross-entropy leaves out.
NO_LABEL = -100
_CHUNK = 256


@dataclass(frozen=True)
class Layout:
    """How windows are cut.

    Attributes:
        max_length: Tokens of a window at most, with the question and the special tokens.
        doc_stride: Tokens of context that a window shares with the one before.
        max_question_length: Tokens of a question at most; the rest is cut off.
    """

    max_length: int
    doc_stride: int
    max_question_length: int


@dataclass(frozen=True)
class TokenizedPair:
    """A question and its context, tokenized as one input of any length.

    Attributes:
        prefix: Tokens before the context: the question and special tokens, `[prefix]`.
        context: Tokens of the context, `[context]`.
        suffix: Special tokens after it, `[suffix]`.
        prefix_types: Segment numbers of the prefix; the context and the suffix have one each.
        starts: First character of each token of the context, `[context]`.
        ends: The character after the last, `[context]`.
        cls: Place of the CLS token within prefix and suffix; 0 without one.
        cut: Tokens of the question that were cut off.
    """

    prefix: list[int]
    context: list[int]
    suffix: list[int]
    prefix_types: list[int]
    context_type: int
    suffix_types: list[int]
    starts: np.ndarray
    ends: np.ndarray
    cls: int
    cut: int


def window_ranges(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a row of tokens into overlapping ranges; the last reaches the end.

    Args:
        tokens: How many there are.
        room: How many a window holds.
        overlap: How many a window shares with the one before, fewer than it holds.

    Returns:
        First token of each range and the one after its last; one empty range for no tokens.

    Example:
        >>> window_ranges(7, room=4, overlap=2)
        [(0, 4), (2, 6), (4, 7)]
        >>> window_ranges(4, room=4, overlap=2)
        [(0, 4)]
    """
    if not 0 <= overlap < room:
        raise ValueError(f"an overlap of {overlap} in windows of {room}")
    ranges = [(0, min(room, tokens))]
    while ranges[-1][1] < tokens:
        start = ranges[-1][0] + room - overlap
        ranges.append((start, min(start + room, tokens)))
    return ranges


def token_range(starts: np.ndarray, ends: np.ndarray, span: tuple[int, int]) -> tuple[int, int]:
    """Return the first and the last token that hold characters of a span.

    Args:
        starts: First character of each token, `[tokens]`, not falling.
        ends: The character after the last, `[tokens]`.
        span: First character and the one after the last.

    Returns:
        Positions of the two tokens; the first is the larger one where no token holds any.

    Example:
        >>> token_range(np.array([0, 4, 9]), np.array([3, 8, 12]), (5, 10))
        (1, 2)
    """
    first = int(np.searchsorted(ends, span[0], side="right"))
    last = int(np.searchsorted(starts, span[1], side="left")) - 1
    return first, last


def window_label(
    answer: tuple[int, int] | None, window: tuple[int, int], offset: int, cls: int
) -> tuple[int, int]:
    """Return the positions that a window is trained to point at.

    Args:
        answer: First and last token of the answer within the context; None for no answer.
        window: First token of the window and the one after its last.
        offset: Position of the window's first token of context.
        cls: Position of the CLS token.

    Returns:
        First and last position of the answer where the window holds all of it, else twice `cls`.

    Example:
        >>> window_label((4, 5), (2, 6), offset=3, cls=0), window_label((4, 6), (2, 6), 3, 0)
        ((5, 6), (0, 0))
    """
    if answer is None or answer[0] < window[0] or answer[1] >= window[1]:
        return cls, cls
    return answer[0] - window[0] + offset, answer[1] - window[0] + offset


def checked_layout(tokenizer: Any, layout: Layout) -> Layout:
    """Fit the length of a window to the model, and make sure that windows get through a context.

    Args:
        tokenizer: A fast tokenizer whose `model_max_length` is what the model takes.
        layout: The settings.

    Raises:
        ConfigError: If the tokenizer knows no offsets, or a window leaves no room for new context.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"The tokenizer {type(tokenizer).__name__} does not say which characters its tokens "
            "are from, so answers cannot be mapped. Use a model with a fast tokenizer."
        )
    length = min(layout.max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = length - layout.max_question_length - special
    if room <= layout.doc_stride:
        clamped = length < layout.max_length
        limit = f" (all that the model takes of {layout.max_length})" if clamped else ""
        raised = "a model that takes more" if clamped else "a higher data.max_length"
        raise ConfigError(
            f"Windows of {length} tokens{limit} leave {max(0, room)} for the context beside "
            f"{special} special tokens and a question of up to {layout.max_question_length}, and "
            f"doc_stride makes {layout.doc_stride} of them repeat the window before. Lower "
            f"data.doc_stride or data.max_question_length, or choose {raised}."
        )
    return Layout(length, layout.doc_stride, layout.max_question_length)


def tokenize_pairs(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_question_length: int
) -> Iterator[TokenizedPair]:
    """Tokenize questions with their whole contexts, the question first.

    Args:
        tokenizer: A fast tokenizer.
        questions: The questions.
        contexts: The context of each.
        max_question_length: Tokens of a question at most.
    """
    encoded = tokenizer(
        # Some questions of SQuAD start with dozens of blanks.
        [question.strip() for question in questions],
        list(contexts),
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    for number, ids in enumerate(encoded["input_ids"]):
        part = encoded.sequence_ids(number)
        types = encoded["token_type_ids"][number]
        in_question, in_context = _extent(part, 0), _extent(part, 1)
        cut = max(0, in_question[1] - in_question[0] - max_question_length)
        removed = range(in_question[1] - cut, in_question[1])
        kept = [place for place in range(in_context[0]) if place not in removed]
        prefix, suffix = [ids[i] for i in kept], ids[in_context[1] :]
        offsets = np.array(
            encoded["offset_mapping"][number][slice(*in_context)], dtype=np.int32
        ).reshape(-1, 2)
        yield TokenizedPair(
            prefix,
            ids[slice(*in_context)],
            suffix,
            [types[i] for i in kept],
            types[in_context[0]] if in_context[0] < in_context[1] else 0,
            types[in_context[1] :],
            offsets[:, 0],
            offsets[:, 1],
            _cls_place(prefix + suffix, tokenizer.cls_token_id),
            cut,
        )


def windows_of(
    pair: TokenizedPair, layout: Layout, span: tuple[int, int] | None, labelled: bool
) -> Iterator[dict[str, Any]]:
    """Cut one question with its context into windows.

    Args:
        pair: The tokenized question and context.
        layout: How it is cut.
        span: Characters of the answer, within the context; None for no answer.
        labelled: Whether the right output is known; `NO_LABEL` stands in its place where not.

    Yields:
        Of each window `input_ids` and `token_type_ids` `[tokens]`; `cls`, `start` and `end`, the
        positions of the CLS token and of the answer; `context_start`, the position of the first
        token of context, and `offset_starts` and `offset_ends` `[tokens of context]`, the
        characters that each is from.
    """
    answer = None if span is None else token_range(pair.starts, pair.ends, span)
    if answer is not None and answer[0] > answer[1]:
        labelled = False  # the tokenizer drops every character of the answer
    room = layout.max_length - len(pair.prefix) - len(pair.suffix)
    offset = len(pair.prefix)
    for window in window_ranges(len(pair.context), room, layout.doc_stride):
        size = window[1] - window[0]
        cls = pair.cls if pair.cls < offset else pair.cls + size
        start, end = window_label(answer, window, offset, cls) if labelled else [NO_LABEL] * 2
        yield {
            "input_ids": [*pair.prefix, *pair.context[slice(*window)], *pair.suffix],
            "token_type_ids": [
                *pair.prefix_types,
                *[pair.context_type] * size,
                *pair.suffix_types,
            ],
            "cls": cls,
            "start": start,
            "end": end,
            "context_start": offset,
            "offset_starts": pair.starts[slice(*window)],
            "offset_ends": pair.ends[slice(*window)],
        }


def chunks(rows: Sequence[int], size: int = _CHUNK) -> Iterator[Sequence[int]]:
    """Cut row numbers into pieces that a tokenizer takes at once.

    >>> list(chunks([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _extent(parts: list[int | None], number: int) -> tuple[int, int]:
    """First position of a part of the input and the one after its last."""
    if number not in parts:
        return len(parts), len(parts)
    return parts.index(number), len(parts) - parts[::-1].index(number)


def _cls_place(special: list[int], cls: int | None) -> int:
    return special.index(cls) if cls in special else 0
