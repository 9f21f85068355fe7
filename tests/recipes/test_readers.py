"""Rows of text files one after the other, and files too large to hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes import files
from lightning_lora.recipes.files import read_table


def test_a_file_without_names_gets_them_from_the_caller(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('gj04\t1\t\tWe "won".\ngj04\t0\t*\tUs wins.\n')
    header = ("source", "label", "mark", "sentence")
    table = read_table(str(tmp_path / "a.tsv"), header=header)
    assert list(table.columns["sentence"]) == ['We "won".', "Us wins."]
    assert table.where(1) == f"{tmp_path / 'a.tsv'}, line 2"


def test_malformed_lines_are_refused_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("id\tlabel\n1\tx\n2\n3\ty\tz\n4\ty\n")
    with pytest.raises(DataError, match=r"a.tsv, line 3: 1 fields where there are 2 columns"):
        read_table(str(file))
    with pytest.warns(UserWarning, match="2 lines .* left out, the first of them line 3"):
        table = read_table(str(file), skip_malformed=True)
    assert list(table.columns["id"]) == ["1", "4"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_large_file_is_mapped_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import datasets

    rows = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(50)]
    file = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        lines = [f"{row['text']},{row['label']}" for row in rows]
        file.write_text("\n".join(["text,label", *lines]))
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    held = read_table(str(file))
    monkeypatch.setattr(files, "LARGE_FILE", 10)
    mapped = read_table(str(file), cache_dir=str(tmp_path / "cache"))
    assert not isinstance(mapped.columns["text"], list)
    assert list(mapped.columns) == list(held.columns)
    for name, values in held.columns.items():
        assert list(mapped.columns[name]) == values
    assert mapped.where(3) == held.where(3)
    some = mapped.select([4, 2])
    assert list(some.columns["text"]) == ["row 4", "row 2"]
    assert some.where(0) == held.where(4)
    assert some.fingerprint != mapped.fingerprint


def test_a_mistake_in_a_large_file_is_still_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE_FILE", 10)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not a JSON object"):
        read_table(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))


def test_keys_of_a_large_file_are_those_of_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE_FILE", 10)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x", "note": "y"}\n{"text": "z"}\n')
    table = read_table(str(file), cache_dir=str(tmp_path / "cache"))
    assert list(table.columns["note"]) == ["y", None]
    file.write_text('{"text": "x"}\n{"text": "z", "note": "y"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the first row has no key 'note'"):
        read_table(str(file), cache_dir=str(tmp_path / "cache"))
