"""Rows of text files, one after the other, each with where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.errors import DataError

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


def delimited_rows(
    file: Path,
    source: str,
    tabs: bool,
    quoting: bool,
    header: Sequence[str] | None = None,
    skip_malformed: bool = False,
) -> NumberedRows:
    """Yield the rows of a CSV or TSV file with the lines they begin in.

    Args:
        file: The file.
        source: What the user calls it.
        tabs: Whether tabs and not commas separate fields.
        quoting: Whether `"` quotes fields.
        header: Names of the columns where the file has no line of names.
        skip_malformed: Leave lines with another number of fields out, and say how many.

    Raises:
        DataError: If the header or a line is not what it should be.
    """
    skipped: list[int] = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        options: dict[str, Any] = {"delimiter": "\t" if tabs else ","}
        options["quoting"] = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        reader = csv.reader(stream, strict=True, **options)
        try:
            names = _column_names(reader, source) if header is None else header
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) == len(names):
                    yield start, dict(zip(names, row, strict=True))
                elif row and skip_malformed:
                    skipped.append(start)
                elif row:
                    raise DataError(
                        f"{source}, line {start}: {len(row)} fields where there are "
                        f"{len(names)} columns ({', '.join(names)})."
                    )
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{source}, line {reader.line_num}: {error}. If quotation marks are part of the "
                "text and do not quote fields, set data.quoting to false."
            ) from error
    if skipped:
        rank_zero_warn(
            f"{source}: {len(skipped)} lines with another number of fields than columns were left "
            f"out, the first of them line {skipped[0]}."
        )


def _column_names(reader: Any, source: str) -> list[str]:
    header: list[str] | None = next(reader, None)
    if not header:
        raise DataError(f"{source}, line 1: no column names.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"{source}, line 1: the column name {repeated[0]!r} occurs more than once. The first "
            "line must hold the names of the columns."
        )
    return header


def first_sign(file: Path) -> str:
    """Return the first character of a text file that is not blank."""
    with file.open(encoding="utf-8-sig") as stream:
        return next((line.lstrip()[0] for line in stream if line.strip()), "")


def json_elements(file: Path, source: str) -> NumberedRows:
    """Yield the objects of a file that is one JSON array, numbered from 1.

    Raises:
        DataError: If it is no array of objects.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{source}, line {error.lineno}: not JSON ({error.msg}).") from error
    for number, record in enumerate(records, start=1):
        yield number, _checked_record(record, source, "element", number)


def json_lines(file: Path, source: str) -> NumberedRows:
    """Yield the objects of a JSON lines file with their lines.

    Raises:
        DataError: If a line is no object.
    """
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{source}, line {number}: not a JSON object ({error.msg}). The file must "
                        "hold one object a line."
                    ) from error
                yield number, _checked_record(record, source, "line", number)


def _checked_record(record: Any, source: str, unit: str, number: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{source}, {unit} {number}: expected an object with the columns as its keys."
        )
    return record
