"""Checked questions: ids, texts, reference answers, and the place of the answer to train on."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lora.errors import DataError
from lightning_lora.recipes.columns import read_ahead
from lightning_lora.recipes.files import Table, is_empty
from lightning_lora.recipes.question_answering.placing import Misplaced, place

COLUMNS = ("id", "question", "context")


class Answer(NamedTuple):
    """A reference answer as the data state it."""

    text: str
    start: int


@dataclass(frozen=True)
class Questions:
    """The questions of one split, row by row.

    Attributes:
        table: What they were read from.
        ids: Their ids, each once.
        questions: Their texts.
        contexts: The text that each is asked about.
        references: Texts of the right answers; none for a question without an answer.
        spans: First character and the one after the last of the answer to train on; None where
            there is none, or where no reference stands in the context.
        misplaced: The answers that do not stand where the data say.
    """

    table: Table
    ids: Sequence[str]
    questions: Sequence[str]
    contexts: Sequence[str]
    references: Sequence[tuple[str, ...]]
    spans: Sequence[tuple[int, int] | None]
    misplaced: Sequence[Misplaced]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, row: int) -> str:
        """Say where a question stands, as `dev.json, question 3 (id 5733be28)`."""
        return f"{self.table.where(row)} (id {self.ids[row]})"

    @property
    def unanswerable(self) -> list[int]:
        """Rows of the questions without an answer."""
        return [row for row, texts in enumerate(self.references) if not texts]

    @property
    def trainable(self) -> list[int]:
        """Rows that say what the right output is: a placed answer, or that there is none."""
        return [
            row
            for row, (texts, span) in enumerate(zip(self.references, self.spans, strict=True))
            if span is not None or not texts
        ]


def check_questions(table: Table, answers: bool = True, move: bool = True) -> Questions:
    """Check a table of questions and find their answers in the contexts.

    Args:
        table: Has the columns `id`, `question`, `context` and, unless they are predicted,
            `answers`; `is_impossible` must agree with them.
        answers: Whether the answers are read.
        move: Whether an answer that does not stand where the data say is looked for elsewhere.

    Raises:
        DataError: If a column is missing, a cell is empty, an id occurs twice, or answers cannot
            be read.
    """
    check_columns(table, (*COLUMNS, "answers") if answers else COLUMNS)
    ids = _checked_ids(table)
    texts, contexts = (read_ahead(table.columns[name]) for name in ("question", "context"))
    for name, column in (("question", texts), ("context", contexts)):
        for row, value in enumerate(column):
            if not isinstance(value, str) or is_empty(value):
                raise DataError(
                    f"{table.where(row)} (id {ids[row]}): the {name} is "
                    f"{'empty' if is_empty(value) else f'no text ({value!r:.40})'}."
                )
    references: list[tuple[str, ...]] = [()] * len(ids)
    spans: list[tuple[int, int] | None] = [None] * len(ids)
    misplaced: list[Misplaced] = []
    if answers:
        for row, (stated, context) in enumerate(zip(_answers(table, ids), contexts, strict=True)):
            references[row] = tuple(answer.text for answer in stated)
            for answer in stated:
                span = place(context, answer.text, answer.start)
                if span is None:
                    wrong = Misplaced.find(row, context, answer.text, answer.start)
                    misplaced.append(wrong)
                    span = wrong.moved_to if move else None
                if spans[row] is None:
                    spans[row] = span
    return Questions(table, ids, texts, contexts, references, spans, misplaced)


def check_columns(table: Table, needed: Sequence[str] = COLUMNS) -> None:
    """Refuse a table that lacks a column.

    Args:
        table: The table.
        needed: The columns.

    Raises:
        DataError: Which are missing, and which there are.
    """
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(
            f"{table.source} has no column {', '.join(map(repr, missing))}. Question answering "
            f"needs {', '.join(needed)}; the columns are: {', '.join(map(str, table.columns))}."
        )


def states_version_2(table: Table) -> bool:
    """Say whether a source marks its questions as answerable or not, as SQuAD 2.0 does."""
    return "is_impossible" in table.columns


def parse_answers(value: Any, where: str) -> list[Answer]:
    """Read the answers of one question; those without text are left out, as SQuAD's script does.

    Args:
        value: `{"text": [...], "answer_start": [...]}` or `[{"text": ..., "answer_start": ...}]`,
            or either written as JSON or as Python prints it; nothing for no answers.
        where: Where it stands, for the message.

    Raises:
        DataError: If it is anything else.

    Example:
        >>> parse_answers('{"text": ["a rose"], "answer_start": [4]}', "x.csv, line 2")
        [Answer(text='a rose', start=4)]
    """
    if is_empty(value):
        return []
    if isinstance(value, str):
        value = _parsed(value, where)
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise _unreadable(where, value)
        if len(texts) != len(starts):
            raise DataError(
                f"{where}: {len(texts)} answers in 'text' and {len(starts)} places in "
                "'answer_start'."
            )
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in value]
    else:
        raise _unreadable(where, value)
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int):
            raise _unreadable(where, {"text": text, "answer_start": start})
    return [Answer(text, start) for text, start in pairs if text.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise _unreadable(where, text) from None


def _unreadable(where: str, value: Any) -> DataError:
    return DataError(
        f"{where}: answers that cannot be read: {value!r:.80}. Give "
        '{"text": ["..."], "answer_start": [number of its first character]}, and empty lists where '
        "there is no answer."
    )


def _checked_ids(table: Table) -> list[str]:
    seen: dict[str, int] = {}
    for row, value in enumerate(read_ahead(table.columns["id"])):
        if is_empty(value):
            raise DataError(f"{table.where(row)}: the id is empty.")
        name = str(value)
        if name in seen:
            raise DataError(
                f"{table.where(row)}: the id {name} stands at {table.where(seen[name])} already. "
                "Predictions and scores are kept by id, so each must occur once."
            )
        seen[name] = row
    return list(seen)


def _answers(table: Table, ids: Sequence[str]) -> Iterator[list[Answer]]:
    flags = table.columns.get("is_impossible") or [None] * len(ids)
    stated = read_ahead(table.columns["answers"])
    for row, (value, flag) in enumerate(zip(stated, flags, strict=True)):
        where = f"{table.where(row)} (id {ids[row]})"
        answers = parse_answers(value, where)
        if isinstance(flag, bool) and flag == bool(answers):
            raise DataError(
                f"{where}: is_impossible is {str(flag).lower()}, and there "
                f"{'are answers' if answers else 'is no answer'}."
            )
        yield answers
