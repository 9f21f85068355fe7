"""What the rows of a table ask for, and which prompts there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.causal_lm.chat import ChatFormat
from lightning_lora.recipes.causal_lm.encoding import fill
from lightning_lora.recipes.causal_lm.records import (
    PAIRS,
    TEXT,
    Columns,
    Message,
    conversation_of,
    messages_of,
    open_turn,
    prompt_of,
    readable,
    text_of,
)
from lightning_lora.recipes.files import Table

_CHUNK = 500
_SHOWN = 80


@dataclass(frozen=True)
class Prompt:
    """What a generation continues.

    Attributes:
        shown: The prompt for people.
        text: The text that is tokenized.
    """

    shown: str
    text: str


@dataclass
class Prompts:
    """The different prompts of some rows.

    Attributes:
        first: For each prompt the first row that has it.
        repeats: For each row the number of its prompt.
        references: For each prompt the completions of all its rows.
    """

    first: list[int] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)


@dataclass
class RowReader:
    """Makes prompts and examples of the rows of a table.

    Attributes:
        table: The rows.
        columns: Which columns are used.
        template: Joins prompts and completions; None for chats and plain text.
        chat: Renders conversations; None where there are none.
        system: System message of conversations that have none.
    """

    table: Table
    columns: Columns
    template: str | None = None
    chat: ChatFormat | None = None
    system: str | None = None

    def cells(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows with their numbers, reading many at a time: `{column: value}`."""
        columns = self.columns
        names = [columns.messages, *columns.prompt, columns.completion, columns.text]
        if "continues" in self.table.columns and columns.kind == TEXT:
            names.append("continues")
        used = {name: self.table.columns[name] for name in names if name is not None}
        for first in range(0, len(self.table), _CHUNK):
            chunk = {name: values[first : first + _CHUNK] for name, values in used.items()}
            for place in range(min(_CHUNK, len(self.table) - first)):
                yield first + place, {name: values[place] for name, values in chunk.items()}

    def question(self, row: int, cells: dict[str, Any]) -> tuple[str | list[Message], str | None]:
        """Return what a row asks for, a text or the messages before an answer, and the answer."""
        columns, table = self.columns, self.table
        if columns.messages is not None:
            messages = self.messages(row, cells)
            return open_turn(messages)
        if columns.prompt:
            asked = prompt_of({name: cells[name] for name in columns.prompt}, table, row)
            answer = None
            if columns.completion is not None:
                answer = text_of(cells[columns.completion], table, row, columns.completion)
            return asked, answer
        assert columns.text is not None
        return text_of(cells[columns.text], table, row, columns.text), None

    def messages(self, row: int, cells: dict[str, Any]) -> list[Message]:
        """Return the conversation of a row, with a system message where one is set."""
        assert self.columns.messages is not None
        column = self.columns.messages
        messages = messages_of(cells[column], self.table, row, column)
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def prompt(self, question: str | list[Message], where: str = "model.sample_prompts") -> Prompt:
        """Return a question as it is put to the model.

        Args:
            question: A text, or the messages of a conversation.
            where: Where it is from, for messages.

        Raises:
            DataError: If there is nothing to ask, or the chat template refuses it.
        """
        if not isinstance(question, str):
            if not question:
                raise DataError(f"{where}: the conversation has no message before its answer.")
            assert self.chat is not None
            return Prompt(readable(question), self.chat.prompt(question, where))
        if self.chat is not None:
            messages = conversation_of(question, None, self.system)
            return Prompt(question, self.chat.prompt(messages, where))
        text = question if self.template is None else fill(self.template, question)[0]
        return Prompt(question, text)

    def prompts_at(self, rows: Sequence[int]) -> Iterator[Prompt]:
        """Yield the prompts of some rows, which are in rising order."""
        wanted = set(rows)
        for row, cells in self.cells():
            if row in wanted:
                yield self.prompt(self.question(row, cells)[0], self.table.where(row))

    def first_prompts(self, count: int) -> list[Prompt]:
        """Return the first different prompts; of plain text its rows' beginnings."""
        found: dict[str, Prompt] = {}
        for row, cells in self.cells():
            question = self.question(row, cells)[0]
            if self.columns.kind == TEXT:
                question = _beginning(str(question))
            if question:
                prompt = self.prompt(question, self.table.where(row))
                found.setdefault(prompt.text, prompt)
            if len(found) == count:
                break
        return list(found.values())

    def prompts(self, labelled: bool) -> Prompts:
        """Return the different prompts of all rows; with `labelled` those that have an answer.

        Raises:
            DataError: If none has.
        """
        found, numbers = Prompts(), dict[bytes, int]()
        for row, cells in self.cells():
            question, answer = self.question(row, cells)
            if labelled and (answer is None or not answer.strip()):
                continue
            number = numbers.setdefault(_digest(question), len(numbers))
            if number == len(found.first):
                found.first.append(row)
                found.references.append([])
            found.repeats.append(number)
            if labelled and answer is not None:
                found.references[number].append(answer)
        if not found.first:
            raise DataError(f"{self.table.source}: no row has a completion to compare with.")
        return found


def prompt_groups(table: Table, columns: Columns) -> list[int]:
    """Return for each row a number that rows with the same prompt share, from 0 on."""
    assert columns.kind == PAIRS
    reader = RowReader(table, Columns(prompt=columns.prompt))
    return reader.prompts(labelled=False).repeats


def _beginning(text: str) -> str:
    """The first words of a text."""
    text = text.strip()
    if len(text) <= _SHOWN:
        return text
    return text[:_SHOWN].rsplit(None, 1)[0]


def _digest(question: str | list[Message]) -> bytes:
    written = json.dumps(question, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(written.encode(), digest_size=16).digest()
