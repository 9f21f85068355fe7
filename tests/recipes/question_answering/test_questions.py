"""Checked questions: ids, answers, and answers at wrong places."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes.files import Table
from lightning_lora.recipes.question_answering.placing import Misplaced, describe, place
from lightning_lora.recipes.question_answering.questions import check_questions, parse_answers

CONTEXT = "ada saw rome and ada left"


def _table(*answers: Any, **columns: Any) -> Table:
    rows = len(answers)
    base: dict[str, Any] = {
        "id": [str(row) for row in range(rows)],
        "question": ["who?"] * rows,
        "context": [CONTEXT] * rows,
        "answers": list(answers),
    }
    return Table("t.jsonl", {**base, **columns}, unit="line")


def _answer(text: str, start: int) -> dict[str, Any]:
    return {"text": [text], "answer_start": [start]}


def _message(table: Table, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        check_questions(table, **settings)
    return str(caught.value)


def test_a_wrong_place_is_counted_and_the_nearest_right_one_taken() -> None:
    table = _table(
        _answer("ada", 0),
        _answer("ada", 15),  # nearer to 17 than to 0
        _answer("ada", 5),
        _answer("ada", -8),  # counted from the end, "ada" does stand there
        _answer("bell", 3),
        {"text": ["bell", "rome"], "answer_start": [0, 8]},
    )
    moved = check_questions(table)
    assert moved.spans == [(0, 3), (17, 20), (0, 3), (0, 3), None, (8, 12)]
    assert [wrong.row for wrong in moved.misplaced] == [1, 2, 3, 4, 5]
    assert moved.misplaced[0] == Misplaced(1, "ada", 15, "d a", (17, 20))
    left = check_questions(table, move=False)
    assert left.spans == [(0, 3), None, None, None, None, (8, 12)]
    # Scores compare texts, so the references stay.
    assert left.references == moved.references
    assert left.references[4] == ("bell",)
    # Neither trained on as an answer nor as a question without one.
    assert left.trainable == [0, 5]
    assert left.unanswerable == []


def test_what_is_said_of_wrong_places() -> None:
    questions = check_questions(_table(_answer("ada", 1), *[_answer("x", 2)] * 4))
    text = describe(
        questions.misplaced, [questions.where(wrong.row) for wrong in questions.misplaced]
    )
    assert text.startswith("5 answers do not stand where answer_start says.")
    assert (
        "t.jsonl, line 1 (id 0): 'ada' is said to start at 1, where the context has 'da '" in text
    )
    assert text.count("is said to start") == 3


def test_blanks_around_an_answer_are_no_part_of_it() -> None:
    assert place(CONTEXT, " rome ", 7) == (8, 12)
    assert place(CONTEXT, "rome", 7) is None
    assert place(CONTEXT, "left", 21) == (21, 25)
    assert place(CONTEXT, "left ", 21) is None
    assert Misplaced.find(0, CONTEXT, "left ", 21).moved_to == (21, 25)


def test_answers_are_read_in_each_notation() -> None:
    expected = [("rome", 8)]
    for value in (
        _answer("rome", 8),
        [{"text": "rome", "answer_start": 8, "answer_id": 3}],
        {"text": "rome", "answer_start": 8},
        '{"text": ["rome"], "answer_start": [8]}',
        "{'text': ['rome'], 'answer_start': [8]}",
    ):
        assert parse_answers(value, "x") == expected
    for value in (None, "", [], {"text": [], "answer_start": []}, _answer(" ", -1), float("nan")):
        assert parse_answers(value, "x") == []


@pytest.mark.parametrize(
    "value",
    ["rome", 3, {"text": ["rome"]}, ["rome"], [{"text": "rome"}], _answer("rome", None)],  # type: ignore[arg-type]
)
def test_answers_that_cannot_be_read(value: Any) -> None:
    message = _message(_table(_answer("ada", 0), value))
    assert message.startswith("t.jsonl, line 2 (id 1): answers that cannot be read")
    assert '{"text": ["..."], "answer_start": [' in message


def test_rows_that_are_refused() -> None:
    good = [_answer("ada", 0), _answer("ada", 0)]
    table = _table(*good)
    short = Table("t.jsonl", {"id": ["1"], "text": ["x"]})
    assert "has no column 'question', 'context', 'answers'" in _message(short)
    assert "2 answers in 'text' and 1 places" in _message(
        _table({"text": ["a", "b"], "answer_start": [0]})
    )
    repeated = _message(_table(*good, id=["x", "x"]))
    assert "t.jsonl, line 2: the id x stands at t.jsonl, line 1 already" in repeated
    assert "line 2: the id is empty" in _message(_table(*good, id=["x", None]))
    empty = _message(_table(*good, context=[CONTEXT, " "]))
    assert "t.jsonl, line 2 (id 1): the context is empty" in empty
    assert "the question is no text (3)" in _message(_table(*good, question=[3, "who?"]))
    contradiction = _message(_table(*good, is_impossible=[False, True]))
    assert "(id 1): is_impossible is true, and there are answers" in contradiction
    nothing = _message(_table(_answer("", -1), is_impossible=[False]))
    assert "is_impossible is false, and there is no answer" in nothing
    assert check_questions(table).ids == ["0", "1"]


def test_to_predict_no_answers_are_needed() -> None:
    columns = dict(_table(None).columns)
    del columns["answers"]
    columns["id"] = [12]
    questions = check_questions(Table("t.csv", columns), answers=False)
    assert questions.ids == ["12"]
    assert questions.references == [()]
    assert questions.misplaced == []
