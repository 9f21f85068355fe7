"""SQuAD files and flat tables, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes.question_answering.questions import check_questions, states_version_2
from lightning_lora.recipes.question_answering.reading import read_questions
from tests.recipes.question_answering.material import question, squad_file

CONTEXT = "ada saw rome , and ada left"


def _message(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read_questions(str(path))
    return str(caught.value)


def test_nested_files_of_both_versions(tmp_path: Path) -> None:
    first = squad_file(
        tmp_path / "a.json", (CONTEXT, [question("1", ("ada", 0), ("ada", 19))]), version="1.1"
    )
    table = read_questions(first)
    assert list(table.columns) == ["id", "question", "context", "answers"]
    assert not states_version_2(table)
    questions = check_questions(table)
    assert questions.references == [("ada", "ada")]
    assert questions.spans == [(0, 3)]
    assert questions.where(0) == f"{first}, question 1 (id 1)"

    second = squad_file(
        tmp_path / "b.json",
        (CONTEXT, [question("1", is_impossible=True, plausible_answers=[{"text": "ada"}])]),
        ("rome", [question("2", ("rome", 0), is_impossible=False)]),
        version="v2.0",
    )
    table = read_questions(second)
    assert states_version_2(table)
    questions = check_questions(table)
    assert questions.references == [(), ("rome",)]
    assert questions.spans == [None, (0, 4)]
    assert questions.unanswerable == [0]
    assert questions.trainable == [0, 1]
    assert list(questions.contexts) == [CONTEXT, "rome"]


def test_flat_files_of_every_kind(tmp_path: Path) -> None:
    answers = {"text": ["rome"], "answer_start": [8]}
    row = {"id": "7", "question": "where?", "context": CONTEXT, "answers": answers}
    empty = {**row, "id": "8", "answers": {"text": [], "answer_start": []}}
    lines = "\n".join(json.dumps(record) for record in (row, empty))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps([row, empty]))
    (tmp_path / "data.json").write_text(json.dumps({"version": "1", "data": [row, empty]}))
    import csv

    for name, written in (("json.csv", json.dumps), ("python.csv", repr)):
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(row)
            for record in (row, empty):
                writer.writerow([*list(record.values())[:3], written(record["answers"])])
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, empty]), tmp_path / "a.parquet")
    found = sorted(tmp_path.iterdir())
    assert len(found) == 7
    for path in found:
        questions = check_questions(read_questions(str(path)))
        assert list(questions.ids) == ["7", "8"], path
        assert questions.references == [("rome",), ()], path
        assert questions.spans == [(8, 12), None], path


def test_a_file_is_told_from_its_rewritten_self(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    squad_file(path, (CONTEXT, [question("1", ("ada", 0))]))
    first = read_questions(str(path)).fingerprint
    assert read_questions(str(path)).fingerprint == first != ""
    squad_file(path, (CONTEXT, [question("1", ("rome", 8))]))
    assert read_questions(str(path)).fingerprint != first


def test_files_that_are_no_squad(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def written(content: object) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return _message(path)

    assert "There is no file" in _message(tmp_path / "b.json")
    assert "is empty" in written("")
    assert "line 1, column 11: not JSON" in written('{"data": [')
    assert "did you mean 'dta'" in written({"version": "1.1", "dta": []})
    assert "holds no questions" in written({"data": []})
    assert "there is no list under 'data'" in written({"data": {"a": 1}})
    place = r"a.json, data[0].paragraphs[1]"
    good = {"context": "x", "qas": []}

    def paragraph(content: object) -> str:
        return written({"data": [{"title": "t", "paragraphs": [good, content]}]})

    assert f"{place}: expected an object, found 'x'" in paragraph("x")
    assert f"{place}: there is no text under 'context'; its keys are: qas" in paragraph({"qas": []})
    assert f"{place}: there is no list under 'qas'" in paragraph({"context": "x"})
    without = {"context": "x", "qas": [{"id": "1"}]}
    assert f"{place}.qas[0]: there is no 'question'; its keys are: id" in paragraph(without)
    without = {"context": "x", "qas": [question("1"), {"question": "who?"}]}
    assert f"{place}.qas[1]: there is no 'id'" in paragraph(without)
    assert "data[0]: there is no list under 'paragraphs'" in written({"data": [{"title": "t"}]})
    path.write_bytes(b'{"data": "\xff"}')
    assert "not UTF-8" in _message(path)
