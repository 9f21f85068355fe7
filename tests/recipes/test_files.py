"""Reading tables: every kind of file, and every complaint with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes.files import Table, read_table, resolve_path


def _write(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


ROWS = [{"text": 'say "yes", now', "label": "a"}, {"text": "no\tmore", "label": "b"}]


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    files = [
        _write(tmp_path, "a.csv", 'text,label\n"say ""yes"", now",a\nno\tmore,b\n'),
        _write(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        _write(tmp_path, "a.json", json.dumps(ROWS)),
        str(tmp_path / "a.parquet"),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[-1])
    for file in files:
        table = read_table(file)
        assert table.columns["text"] == ['say "yes", now', "no\tmore"], file
        assert table.columns["label"] == ["a", "b"], file


def test_tsv_is_read_without_quoting_unless_asked(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.tsv", 'text\tlabel\n"Tis\ta\n"quoted"\tb\n')
    assert read_table(file).columns["text"] == ['"Tis', '"quoted"']
    balanced = _write(tmp_path, "b.tsv", 'text\tlabel\n"quoted"\tb\n')
    assert read_table(balanced, quoting=True).columns["text"] == ["quoted"]


def test_places_count_lines_of_the_file(tmp_path: Path) -> None:
    table = read_table(_write(tmp_path, "a.csv", 'text,label\n"two\nlines",a\n\nnext,b\n'))
    assert table.where(0).endswith("a.csv, line 2")
    assert table.where(1).endswith("a.csv, line 5")
    assert table.select([1]).where(0).endswith("a.csv, line 5")
    assert Table("x", {"text": ["p", "q"]}).select([1]).where(0) == "x, row 2"


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.csv", "\ufefftext,label\nx,a\n")
    assert list(read_table(file).columns) == ["text", "label"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "text,label\nx,a\ny\n", "line 3: 1 fields"),
        ("a.csv", 'text,label\n"x,a\n', "data.quoting"),
        ("a.csv", "text,text\nx,a\n", "more than once"),
        ("a.txt", "text,label\n", "suffix .txt"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2: not a JSON object"),
        ("a.jsonl", '{"text": "x"}\n3\n', "line 2: expected an object"),
        ("a.json", '[{"text": "x"}, 3]', "element 2: expected an object"),
        ("a.parquet", "no parquet", "not a Parquet file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(_write(tmp_path, name, content))
    assert name in str(caught.value)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text: byte 14 is 0xe9"):
        read_table(str(tmp_path / "a.csv"))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    _write(tmp_path, "train.csv", "text\nx\n")
    with pytest.raises(DataError, match=r"did you mean 'train.csv'\?"):
        read_table(str(tmp_path / "trian.csv"))
    with pytest.raises(DataError, match="nor a folder"):
        read_table(str(tmp_path / "nowhere" / "train.csv"))


def test_unknown_bundled_names_list_what_there_is() -> None:
    with pytest.raises(DataError, match="Nothing called bundled:quikstart"):
        resolve_path("bundled:quikstart")


def test_a_missing_column_lists_the_columns() -> None:
    with pytest.raises(DataError, match=r"did you mean 'label'\?\). Its columns are: text, label"):
        Table("x", {"text": ["p"], "label": ["q"]}).column("lable", "data.label_column")
