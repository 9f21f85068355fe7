"""Text files in pieces: nothing lost, documents as wanted, large ones on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes import files
from lightning_lora.recipes.causal_lm import text_files
from lightning_lora.recipes.causal_lm.text_files import read_text_file


def _play(path: Path) -> str:
    text = "".join(f"SPEAKER {n}:\n{'word ' * (n % 40)}é\n\n" for n in range(400))
    path.write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("large", [False, True])
def test_pieces_are_the_whole_file_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(files, "LARGE_FILE", 1)
    text = _play(tmp_path / "play.txt")
    table = read_text_file(str(tmp_path / "play.txt"), cache_dir=str(tmp_path / "cache"))
    pieces = list(table.columns["text"])
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and piece[0] in "Swé" for piece in pieces)
    assert list(table.columns["continues"]) == [True] * (len(pieces) - 1) + [False]
    lines = text.splitlines()
    for row, piece in enumerate(pieces):
        assert table.where(row).endswith(f", line {table.numbers[row]}")  # type: ignore[index]
        assert lines[table.numbers[row] - 1] == piece.splitlines()[0]  # type: ignore[index]
    assert (tmp_path / "cache").exists() == large


def test_a_file_without_line_breaks_is_cut_nevertheless(tmp_path: Path) -> None:
    text = "abcdefghij" * 20_000
    (tmp_path / "one.txt").write_text(text)
    pieces = list(read_text_file(str(tmp_path / "one.txt")).columns["text"])
    assert "".join(pieces) == text
    assert len(pieces) > 2


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["one\ntwo\n\n\nthree\n \nfour"]),
        ("paragraph", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_documents_are_files_paragraphs_or_lines(
    tmp_path: Path, documents: str, expected: list[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\r\n \r\nfour")
    table = read_text_file(str(tmp_path / "a.txt"), documents)
    found = [""]
    for text, continues in zip(table.columns["text"], table.columns["continues"], strict=True):
        found[-1] += text
        found += [] if continues else [""]
    assert found == [*expected, ""]
    if documents == "line":
        assert list(table.numbers) == [1, 2, 5, 7]  # type: ignore[arg-type]


def test_long_lines_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_LONGEST_READ", 4)
    (tmp_path / "a.txt").write_text("one line\n\nand   another\n")
    for documents in ("line", "paragraph"):
        table = read_text_file(str(tmp_path / "a.txt"), documents)
        assert list(table.columns["text"]) == ["one line", "and   another"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt is empty"),
        (b" \n\n", "a.txt is empty"),
        (b"good\nlines\n" + "caf\xe9".encode("latin1"), r"not UTF-8 text: near line \d.*0xe9"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text_file(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="folder"):
        read_text_file(str(tmp_path))
    with pytest.raises(DataError, match=r"no file .*b\.txt \(did you mean 'a\.txt'\?\)"):
        read_text_file(str(tmp_path / "b.txt"))
