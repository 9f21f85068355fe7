"""Prepared rows: made once, shared, never half-written."""

from __future__ import annotations

import errno
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.recipes import cache
from lightning_lora.recipes.cache import cached_rows, file_fingerprint, tokenizer_fingerprint


def _rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"input_ids": list(range(number + 1)), "text": f"row {number}"}


def test_rows_are_built_once_for_the_same_inputs_and_mapped_from_disk(tmp_path: Path) -> None:
    calls = []

    def build() -> Iterator[dict[str, Any]]:
        calls.append(1)
        return _rows(3)

    folder = str(tmp_path)
    first = cached_rows(["a", {"x": 1}], build, folder)
    again = cached_rows(["a", {"x": 1}], build, folder)
    assert first[:] == again[:] == {"input_ids": [[0], [0, 1], [0, 1, 2]], "text": first["text"][:]}
    assert again.cache_files[0]["filename"].startswith(folder)
    assert len(calls) == 1
    cached_rows(["a", {"x": 2}], build, folder)
    assert len(calls) == 2


def test_a_failure_leaves_nothing_behind_and_the_next_try_is_whole(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from _rows(2)
        raise DataError("line 3 is wrong")

    with pytest.raises(DataError, match="line 3 is wrong"):
        cached_rows(["a"], broken, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(cached_rows(["a"], lambda: _rows(4), str(tmp_path))) == 4


def test_a_full_disk_names_the_folder_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.cache_dir"):
        cached_rows(["a"], lambda: _rows(1), str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_no_rows_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row that can be used"):
        cached_rows(["none"], lambda: iter([]), str(tmp_path))


def _build_slowly(folder: str, marks: str) -> None:
    def build() -> Iterator[dict[str, Any]]:
        with Path(marks).open("a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        yield {"x": 1}

    assert cached_rows(["shared"], build, folder)["x"][:] == [1]


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "cache"), str(tmp_path / "marks"))
    workers = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "marks").read_text() == "built\n"


def test_a_file_that_is_written_again_has_another_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = file_fingerprint(file)
    assert file_fingerprint(file) == before
    file.write_text("three")
    assert file_fingerprint(file) != before


def test_what_a_call_leaves_in_a_tokenizer_does_not_count_but_its_words_do(
    tiny_model: Path,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("good film", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["splendid"])
    assert tokenizer_fingerprint(tokenizer) != before
