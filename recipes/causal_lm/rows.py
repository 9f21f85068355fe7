"""Rows of a table into tokenized examples, and prompts into tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lightning_lora.errors import DataError
from lightning_lora.recipes.causal_lm.encoding import (
    Encoded,
    encode_pairs,
    encode_prompts,
    fill,
    opening_ids,
    text_blocks,
)
from lightning_lora.recipes.causal_lm.reader import Prompt, RowReader
from lightning_lora.recipes.causal_lm.records import (
    ASSISTANT,
    CHAT,
    TEXT,
    Message,
    conversation_of,
)
from lightning_lora.recipes.files import Table

_CHUNK = 500


def prompt_rows(
    tokenizer: Any, reader: RowReader, prompts: Iterable[Prompt], limit: int | None
) -> Iterator[dict[str, Any]]:
    """Tokenize prompts; of long ones the beginning is left out, with a warning.

    Args:
        tokenizer: The tokenizer.
        reader: What made the prompts.
        prompts: The prompts.
        limit: Tokens of a prompt at most; None takes all.

    Yields:
        `input_ids`, a list, and `prompt`, the prompt for people.
    """
    # A chat template writes such tokens itself.
    opening = opening_ids(tokenizer) if reader.chat is None else []
    iterator, cut = iter(prompts), 0
    while chunk := list(islice(iterator, _CHUNK)):
        encoded = encode_prompts(tokenizer, [prompt.text for prompt in chunk], opening)
        for prompt, ids in zip(chunk, encoded, strict=True):
            cut += limit is not None and len(ids) > limit
            yield {"input_ids": ids if limit is None else ids[-limit:], "prompt": prompt.shown}
    if cut:
        warnings.warn(
            f"{reader.table.source}: {cut} prompts are longer than the {limit} tokens that the "
            "model has room for beside what it generates; their beginnings were left out.",
            stacklevel=2,
        )


def example_rows(
    tokenizer: Any, reader: RowReader, limit: int, train_on_prompt: bool, apart: bool
) -> Iterator[dict[str, Any]]:
    """Tokenize the rows of a table into examples, and say which could not be used as they are.

    Args:
        tokenizer: The tokenizer.
        reader: Reads the rows.
        limit: Tokens of an example at most.
        train_on_prompt: Whether everything is trained, and not completions alone.
        apart: Whether a block of plain text ends with its document.

    Yields:
        `input_ids` int32 and `trained` bool, both `[tokens]`, `length`, and the example's number as
        `row`.

    Raises:
        DataError: If no row can be used, or one holds something else than it should.
    """
    tally = _Tally(reader.table)
    if reader.columns.kind == TEXT:
        encoded = _text_examples(tokenizer, reader, limit, apart)
    else:
        encoded = _answered_examples(tokenizer, reader, limit, train_on_prompt, tally)
    number = 0
    for example in encoded:
        yield {
            "input_ids": np.asarray(example.ids, dtype=np.int32),
            "trained": np.asarray(example.trained, dtype=bool),
            "length": len(example.ids),
            "row": number,
        }
        number += 1
    tally.report(number, limit)


def _text_examples(tokenizer: Any, reader: RowReader, limit: int, apart: bool) -> Iterator[Encoded]:
    def pieces() -> Iterator[list[tuple[str, bool]]]:
        cells = reader.cells()
        while chunk := list(islice(cells, _CHUNK)):
            texts = [
                (str(reader.question(row, values)[0]), bool(values.get("continues", False)))
                for row, values in chunk
            ]
            yield [(text, continues) for text, continues in texts if text or continues]

    for ids in text_blocks(tokenizer, pieces(), limit, opening_ids(tokenizer), apart):
        yield Encoded(ids, [True] * len(ids))


def _answered_examples(
    tokenizer: Any, reader: RowReader, limit: int, train_on_prompt: bool, tally: _Tally
) -> Iterator[Encoded]:
    cells = reader.cells()
    opening = opening_ids(tokenizer)
    while chunk := list(islice(cells, _CHUNK)):
        for example in _encode(tokenizer, reader, chunk, opening, train_on_prompt, tally):
            if train_on_prompt:
                example.trained = [True] * len(example.ids)
            shorter = example.cut(limit)
            if not shorter.targets:
                tally.no_room += 1
                continue
            tally.cut += len(example.ids) > limit
            yield shorter


def _encode(
    tokenizer: Any,
    reader: RowReader,
    chunk: list[tuple[int, dict[str, Any]]],
    opening: list[int],
    train_on_prompt: bool,
    tally: _Tally,
) -> list[Encoded]:
    chats: list[tuple[list[Message], str]] = []
    pairs: list[tuple[str, str]] = []
    for row, cells in chunk:
        if reader.columns.kind == CHAT:
            messages = reader.messages(row, cells)
            answers = (m["content"] for m in messages if m["role"] == ASSISTANT)
            answered = any(answer.strip() for answer in answers)
        else:
            question, answer = reader.question(row, cells)
            answered = bool(answer and answer.strip())
            if reader.chat is not None:
                messages = conversation_of(str(question), answer, reader.system)
        if not answered:
            tally.empty += 1
        elif reader.chat is not None:
            chats.append((messages, reader.table.where(row)))
        else:
            assert reader.template is not None
            pairs.append(fill(reader.template, str(question), str(answer)))
    if reader.chat is not None:
        return [Encoded(ids, trained) for ids, trained in reader.chat.encode(chats)]
    return encode_pairs(tokenizer, pairs, opening)


@dataclass
class _Tally:
    """Counts of rows that were not used, or not whole."""

    table: Table
    empty: int = 0
    no_room: int = 0
    cut: int = 0

    def report(self, used: int, limit: int) -> None:
        """Warn of what was found; whichever rank prepares the rows says it.

        Raises:
            DataError: If nothing was used.
        """
        reasons = {
            "have no completion": self.empty,
            f"have a prompt that leaves no room for a completion in {limit} tokens": self.no_room,
        }
        listed = " and ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if not used:
            raise DataError(
                f"{self.table.source}: none of the {len(self.table)} rows can be used: "
                f"{listed or 'there is no text in them'}."
                + (" Raise data.max_length." if self.no_room else "")
            )
        if listed:
            warnings.warn(
                f"{self.table.source}: of {len(self.table)} rows {listed}; they were left out.",
                stacklevel=2,
            )
        if self.cut:
            warnings.warn(
                f"{self.table.source}: {self.cut} examples are longer than {limit} tokens "
                "(data.max_length, or what the model takes); the rest of them was cut off.",
                stacklevel=2,
            )
