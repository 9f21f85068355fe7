"""Tables on disk: CSV, TSV, JSON lines and Parquet files, and paths into the installed package.

A table is a dictionary of columns with the file's name and line numbers beside it, so that every
complaint about a value can say where the value stands.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_lora.errors import DataError

BUNDLED = "bundled:"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns of equal length, read from one source.

    Attributes:
        source: What the user calls it: a path or a dataset's name and split.
        columns: The values, column by column.
        numbers: What the user counts each row as; None counts from 1.
        unit: What is counted: `"line"` in text files, `"row"` elsewhere.
        class_names: Names of the classes where the source itself declares them.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    numbers: Sequence[int] | None = None
    unit: str = "row"
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def column(self, name: str, setting: str) -> Sequence[Any]:
        """Return one column.

        Args:
            name: The column's name.
            setting: The setting that names the column, for the error message.

        Raises:
            DataError: If there is no such column.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.source} has no column {name!r}{nearest(name, self.columns)}. Its columns "
                f"are: {', '.join(map(str, self.columns))}. Name the right one with {setting}."
            )
        return self.columns[name]

    def where(self, row: int) -> str:
        """Say where a row stands, as `train.tsv, line 17`."""
        number = row + 1 if self.numbers is None else self.numbers[row]
        return f"{self.source}, {self.unit} {number}"

    def select(self, rows: Sequence[int]) -> Table:
        """Return a table of these rows, which keep their place in the source."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        numbers = [row + 1 if self.numbers is None else self.numbers[row] for row in rows]
        return replace(self, columns=columns, numbers=numbers)


def nearest(word: str, known: Any) -> str:
    """Return `" (did you mean 'x'?)"` for the known name nearest to `word`, or nothing.

    >>> nearest("lable", ["text", "label"])
    " (did you mean 'label'?)"
    """
    matches = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def resolve_path(path: str) -> Path:
    """Turn a path of the user's into a `Path`; `bundled:` paths point into the package.

    Args:
        path: A path, `~` allowed, or `bundled:` and a path below the package's recipes.

    Raises:
        DataError: If nothing is there; bundled names that come near are listed.
    """
    if not path.startswith(BUNDLED):
        resolved = Path(path).expanduser()
        if not resolved.exists():
            raise DataError(f"There is no file {path}{_neighbours(resolved)}.")
        return resolved
    root = Path(str(resources.files("lightning_lora.recipes")))
    resolved = root / path.removeprefix(BUNDLED)
    if not resolved.exists():
        names = bundled_names()
        raise DataError(
            f"Nothing called {path} is shipped with the package{nearest(path, names)}. "
            f"There is: {', '.join(names) or 'nothing'}."
        )
    return resolved


def bundled_names() -> list[str]:
    """Return what `bundled:` can name: the shipped folders and the data files in them."""
    root = Path(str(resources.files("lightning_lora.recipes")))
    bases = sorted(config.parents[1] for config in root.glob("*/base/config.json"))
    names = [f"{BUNDLED}{folder.name}" for folder in bases]
    data = sorted(path for path in root.glob("*/data/*") if path.suffix in SUFFIXES)
    return names + [f"{BUNDLED}{path.relative_to(root).as_posix()}" for path in data]


def read_table(path: str, quoting: bool | None = None) -> Table:
    """Read a CSV, TSV, JSON lines or Parquet file whose kind its suffix tells.

    Args:
        path: The file; CSV and TSV files start with a line of column names.
        quoting: Whether `"` quotes a field. None means yes for CSV and no for TSV, as in GLUE,
            where quotation marks are part of the text.

    Raises:
        DataError: If the file is missing, empty, or cannot be read as what its suffix says.
    """
    file = resolve_path(path)
    if file.is_dir():
        raise DataError(f"{path} is a folder; name one file in it.")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path} cannot be read: the suffix {suffix or '(none)'} is not one of "
            f"{', '.join(SUFFIXES)}."
        )
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    try:
        if suffix == ".parquet":
            table = _read_parquet(file, path)
        elif suffix in (".jsonl", ".json"):
            table = _read_json(file, path)
        else:
            tabs = suffix == ".tsv"
            table = _read_delimited(file, path, tabs, quoting if quoting is not None else not tabs)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}. "
            "Convert the file, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not len(table):
        raise DataError(f"{path} holds column names and no rows.")
    return table


def is_empty(value: Any) -> bool:
    """Say whether a cell holds nothing: None, NaN or blank text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


def _neighbours(missing: Path) -> str:
    folder = missing.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    return nearest(missing.name, sorted(path.name for path in folder.iterdir()))


def _read_delimited(file: Path, source: str, tabs: bool, quoting: bool) -> Table:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        options: dict[str, Any] = {"delimiter": "\t" if tabs else ","}
        options["quoting"] = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        reader = csv.reader(stream, strict=True, **options)
        try:
            return _collect_rows(reader, source)
        except csv.Error as error:
            raise DataError(
                f"{source}, line {reader.line_num}: {error}. If quotation marks are part of the "
                "text and do not quote fields, set data.quoting to false."
            ) from error


def _collect_rows(reader: Any, source: str) -> Table:
    header = next(reader, None)
    if not header:
        raise DataError(f"{source}, line 1: no column names.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"{source}, line 1: the column name {repeated[0]!r} occurs more than once. The first "
            "line must hold the names of the columns."
        )
    rows: list[list[str]] = []
    lines: list[int] = []
    start = reader.line_num + 1
    for row in reader:
        if row:
            if len(row) != len(header):
                raise DataError(
                    f"{source}, line {start}: {len(row)} fields where the first line names "
                    f"{len(header)} columns ({', '.join(header)})."
                )
            rows.append(row)
            lines.append(start)
        start = reader.line_num + 1
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return Table(source, columns, lines, "line")


def _read_json(file: Path, source: str) -> Table:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() == ".json" and text.lstrip().startswith("["):
        unit = "element"
        try:
            records = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {error.lineno}: not JSON ({error.msg}).") from error
    else:
        unit = "line"
        records = list(_json_lines(text, source))
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{source}, {unit} {number}: expected an object with the columns as its keys."
            )
    names = dict.fromkeys(name for _, record in records for name in record)
    columns = {name: [record.get(name) for _, record in records] for name in names}
    return Table(source, columns, [number for number, _ in records], unit)


def _json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}, line {number}: not a JSON object ({error.msg}). The file must hold "
                    "one object a line."
                ) from error


def _read_parquet(file: Path, source: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{source} is not a Parquet file that can be read: {error}.") from error
    return Table(source, {name: table[name].to_pylist() for name in table.column_names})
