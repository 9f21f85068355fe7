"""What a row says: columns, conversations in their several spellings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes.causal_lm.records import (
    Columns,
    choose_columns,
    messages_of,
    open_turn,
    prompt_of,
    text_of,
)
from lightning_lora.recipes.files import Table


def _table(*names: str) -> Table:
    return Table("a.jsonl", {name: ["x"] for name in names}, [7], "line")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["messages", "text"], Columns(messages="messages")),
        (["conversations"], Columns(messages="conversations")),
        (["prompt", "completion"], Columns(prompt=("prompt",), completion="completion")),
        (["question", "answer"], Columns(prompt=("question",), completion="answer")),
        (["instruction", "output"], Columns(prompt=("instruction",), completion="output")),
        (
            ["instruction", "input", "output"],
            Columns(prompt=("instruction", "input"), completion="output"),
        ),
        (["text", "id"], Columns(text="text")),
    ],
)
def test_usual_columns_are_found(names: list[str], expected: Columns) -> None:
    assert choose_columns(_table(*names), Columns()) == expected


def test_a_named_column_goes_before_a_usual_one() -> None:
    given = Columns(prompt=("mr",), completion="ref")
    assert choose_columns(_table("mr", "ref", "messages"), given) == given


def test_without_labels_completions_are_not_needed() -> None:
    found = choose_columns(_table("question"), Columns(), labelled=False)
    assert found == Columns(prompt=("question",))
    given = Columns(prompt=("mr",), completion="ref")
    assert choose_columns(_table("mr"), given, labelled=False) == Columns(prompt=("mr",))


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"no column 'reff' \(did you mean 'ref'\?\).*completion_c"):
        choose_columns(_table("mr", "ref"), Columns(prompt=("mr",), completion="reff"))
    with pytest.raises(DataError, match=r"columns a, b\. Say what .*messages_column.*text_column"):
        choose_columns(_table("a", "b"), Columns())


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (Columns(messages="m", text="t"), "messages_column and text_column name different"),
        (Columns(completion="c"), "completion_column needs prompt_column"),
        (Columns(prompt=("p",)), "prompt_column needs completion_column"),
    ],
)
def test_settings_that_contradict_each_other(columns: Columns, problem: str) -> None:
    (found,) = columns.problems()
    assert problem in found


def test_conversations_in_all_spellings_are_the_same() -> None:
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    share_gpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello", "weight": None},
    ]
    written = (
        '[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"},'
        '{"from":"bot","value":"Hello"}]'
    )
    for value in (expected, share_gpt, written):
        assert messages_of(value, _table("m"), 0, "m") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Hi", r"a\.jsonl, line 7: the column 'm' holds text and not a list of messages"),
        (3.5, r"the column 'm' holds 3\.5 and not a list"),
        (None, "holds nothing and not a list"),
        (["Hi"], "message 1: text where a message should be"),
        ([{"role": "user", "contents": "Hi"}], r"no 'content' \(did you mean 'contents'\?\)"),
        ([{"role": "user", "content": ["Hi"]}], "message 1: 'content' is a list and not text"),
    ],
)
def test_conversations_that_are_none(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        messages_of(value, _table("m"), 0, "m")


def test_texts_and_numbers_are_text_and_other_things_are_not() -> None:
    table = _table("answer")
    assert [text_of(value, table, 0, "answer") for value in ("a", 72, None, float("nan"))] == [
        "a",
        "72",
        "",
        "",
    ]
    with pytest.raises(DataError, match=r"line 7: the column 'answer' holds a list and not text"):
        text_of(["a"], table, 0, "answer")
    with pytest.raises(DataError, match="holds true or false"):
        text_of(True, table, 0, "answer")


def test_prompts_of_several_columns_leave_empty_ones_out() -> None:
    table = _table("instruction", "input")
    assert prompt_of({"instruction": "Add.", "input": "1 2"}, table, 0) == "Add.\n\n1 2"
    assert prompt_of({"instruction": "Add.", "input": None}, table, 0) == "Add."


def test_an_open_turn_is_what_is_to_be_answered() -> None:
    question = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello"}
    assert open_turn([question, answer]) == ([question], "Hello")
    assert open_turn([question, answer, question]) == ([question, answer, question], None)
    assert open_turn([answer, question, answer]) == ([answer, question], "Hello")
