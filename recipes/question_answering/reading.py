"""Questions with their contexts, from SQuAD's JSON files and from flat tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.cache import file_fingerprint, fingerprint
from lightning_lora.recipes.files import Table, nearest, read_table, resolve_path

_QUESTION_KEYS = ("id", "question")


def read_questions(path: str, quoting: bool | None = None, cache_dir: str | None = None) -> Table:
    """Read a SQuAD JSON file (v1.1 or v2.0), or a CSV, TSV, JSON lines or Parquet file.

    Args:
        path: The file. A `.json` file may hold SQuAD's nested layout, a list of flat rows, or flat
            rows under the key `data`.
        quoting: Whether `"` quotes a field in CSV and TSV files, as in `read_table`.
        cache_dir: Where a large table's rows are kept, as in `read_table`.

    Returns:
        A table with the file's columns; of nested files `id`, `question`, `context` and `answers`,
        and `is_impossible` where the file is of version 2.

    Raises:
        DataError: If the file is missing, empty, no JSON, or lacks a key.
    """
    file = resolve_path(path)
    if file.suffix.lower() == ".json" and file.is_file():
        content = _json_object(file, path)
        if isinstance(content, dict) and "data" in content:
            state = fingerprint(["squad", file_fingerprint(file)])
            return _table_of(content, path, state)
        if isinstance(content, dict) and not {"question", "context"} & set(content):
            raise DataError(
                f"{path}: there is no 'data'{nearest('data', content)}. A SQuAD file is an object "
                'with "version" and "data"; its keys are: '
                f"{', '.join(content) or '(none)'}."
            )
    return read_table(path, quoting, cache_dir)


def _json_object(file: Path, source: str) -> Any:
    """Return what the file holds; None where it holds JSON lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text) if text.strip() else None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(
            f"{source}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
        ) from error


def _table_of(content: dict[str, Any], source: str, state: str) -> Table:
    names = ["id", "question", "context", "answers"]
    rows = list(_questions(content["data"], source))
    if not rows:
        raise DataError(f"{source} holds no questions.")
    version = str(content.get("version", "")).lstrip("vV")
    if version.startswith("2") or any("is_impossible" in row for row in rows):
        names.append("is_impossible")
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(source, columns, unit="question", fingerprint=state)


def _questions(data: Any, source: str) -> Iterator[dict[str, Any]]:
    for article, place in _elements(data, source, "data"):
        if "context" in article and "question" in article:
            yield _checked(article, place)
            continue
        for paragraph, inner in _elements(article.get("paragraphs"), place, "paragraphs"):
            context = paragraph.get("context")
            if not isinstance(context, str):
                raise DataError(f"{inner}: there is no text under 'context'{_found(paragraph)}.")
            for question, last in _elements(paragraph.get("qas"), inner, "qas"):
                yield {**_checked(question, last), "context": context}


def _elements(values: Any, place: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a list, each with its place: `dev.json, data[3].paragraphs[0]`."""
    joint = "." if place.endswith("]") else ", "
    if not isinstance(values, list):
        raise DataError(f"{place}: there is no list under {name!r}, as SQuAD's layout has it.")
    for number, value in enumerate(values):
        inner = f"{place}{joint}{name}[{number}]"
        if not isinstance(value, dict):
            raise DataError(f"{inner}: expected an object, found {value!r:.40}.")
        yield value, inner


def _checked(question: dict[str, Any], place: str) -> dict[str, Any]:
    for key in _QUESTION_KEYS:
        if question.get(key) is None:
            raise DataError(f"{place}: there is no {key!r}{_found(question)}.")
    return question


def _found(content: dict[str, Any]) -> str:
    return f"; its keys are: {', '.join(map(str, content)) or '(none)'}"
