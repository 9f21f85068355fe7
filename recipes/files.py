"""Tables on disk: CSV, TSV, JSON lines and Parquet files, and paths into the installed package.

A table is a dictionary of columns with the file's name and line numbers beside it, so that every
complaint about a value can say where the value stands. Files too large to hold are read once into
memory-mapped columns.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_lora.errors import DataError
from lightning_lora.recipes.cache import cached_rows, file_fingerprint, fingerprint
from lightning_lora.recipes.columns import Selection, read_ahead
from lightning_lora.recipes.readers import (
    NumberedRows,
    delimited_rows,
    first_sign,
    json_elements,
    json_lines,
)

BUNDLED = "bundled:"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# Bytes from which on a file's rows are not kept in memory.
LARGE_FILE = 64 * 2**20
_LINE = "__line__"


@dataclass(frozen=True)
class Table:
    """Columns of equal length, read from one source.

    Attributes:
        source: What the user calls it: a path or a dataset's name and split.
        columns: The values, column by column.
        numbers: What the user counts each row as; None counts from 1.
        unit: What is counted: `"line"` in text files, `"row"` elsewhere.
        class_names: Names of the classes where the source itself declares them.
        fingerprint: Tells these rows from others, for what is prepared from them.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    numbers: Sequence[int] | None = None
    unit: str = "row"
    class_names: list[str] | None = None
    fingerprint: str = ""

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
        return read_ahead(self.columns[name])

    def where(self, row: int) -> str:
        """Say where a row stands, as `train.tsv, line 17`."""
        number = row + 1 if self.numbers is None else self.numbers[row]
        return f"{self.source}, {self.unit} {number}"

    def select(self, rows: Sequence[int]) -> Table:
        """Return a table of these rows, which keep their place in the source."""
        columns = {name: Selection(values, rows) for name, values in self.columns.items()}
        numbers = [row + 1 if self.numbers is None else self.numbers[row] for row in rows]
        chosen = fingerprint([self.fingerprint, list(rows)])
        return replace(self, columns=columns, numbers=numbers, fingerprint=chosen)


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


def read_table(
    path: str,
    quoting: bool | None = None,
    cache_dir: str | None = None,
    header: Sequence[str] | None = None,
    skip_malformed: bool = False,
) -> Table:
    """Read a CSV, TSV, JSON lines or Parquet file whose kind its suffix tells.

    Args:
        path: The file; CSV and TSV files start with a line of column names.
        quoting: Whether `"` quotes a field. None means yes for CSV and no for TSV, as in GLUE,
            where quotation marks are part of the text.
        cache_dir: Where a large file's rows are kept, as in `cached_rows`.
        header: Names of the columns of a CSV or TSV file that has no line of names.
        skip_malformed: Leave out lines with too few or too many fields, with a warning, in place of
            refusing the file.

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
    unit = "line" if suffix in (".csv", ".tsv", ".jsonl") else "row"
    state = fingerprint([file_fingerprint(file), quoting, header, skip_malformed])
    try:
        if suffix == ".parquet":
            table = _read_parquet(file, path, state)
        else:
            rows: Callable[[], NumberedRows]
            if suffix == ".json" and first_sign(file) == "[":
                unit, rows = "element", partial(json_elements, file, path)
            elif unit == "line" and suffix != ".jsonl":
                tabs = suffix == ".tsv"
                quoted = quoting if quoting is not None else not tabs
                rows = partial(delimited_rows, file, path, tabs, quoted, header, skip_malformed)
            else:
                unit, rows = "line", partial(json_lines, file, path)
            table = collect_rows(rows, file, path, unit, state, cache_dir)
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


def collect_rows(
    rows: Callable[[], NumberedRows],
    file: Path,
    source: str,
    unit: str,
    state: str,
    cache_dir: str | None = None,
) -> Table:
    """Make a table of rows as they are read: in memory, or on disk where the file is large.

    Args:
        rows: Yields the rows with their numbers; not called where they lie on disk already.
        file: The file, whose size decides.
        source: What the user calls it.
        unit: What the numbers count.
        state: The table's fingerprint.
        cache_dir: Where a large file's rows are kept, as in `cached_rows`.

    Raises:
        DataError: If a row of a large file has a key that the first has not.
    """
    if file.stat().st_size >= LARGE_FILE:
        return _map_rows(cache_dir, rows, source, unit, state)
    return _hold_rows(rows, source, unit, state)


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


def _hold_rows(rows: Callable[[], NumberedRows], source: str, unit: str, state: str) -> Table:
    """Keep the rows in memory."""
    numbered = list(rows())
    names = dict.fromkeys(name for _, row in numbered for name in row)
    columns = {name: [row.get(name) for _, row in numbered] for name in names}
    return Table(source, columns, [number for number, _ in numbered], unit, fingerprint=state)


def _map_rows(
    cache_dir: str | None,
    rows: Callable[[], NumberedRows],
    source: str,
    unit: str,
    state: str,
) -> Table:
    """Write the rows to disk as they are read, and map them into memory."""

    def build() -> Iterator[dict[str, Any]]:
        names: list[str] | None = None
        for number, row in rows():
            names = names or list(row)
            later = [name for name in row if name not in names]
            if later:
                raise DataError(
                    f"{source}, {unit} {number}: the first row has no key {later[0]!r}. In a "
                    "file of this size the first row must have all keys."
                )
            yield {_LINE: number, **{name: row.get(name) for name in names}}

    mapped = cached_rows(["table", state], build, cache_dir)
    columns = {name: mapped[name] for name in mapped.column_names if name != _LINE}
    return Table(source, columns, mapped[_LINE], unit, fingerprint=state)


def _read_parquet(file: Path, source: str, state: str) -> Table:
    import datasets
    import pyarrow.parquet

    try:
        if file.stat().st_size >= LARGE_FILE:
            rows = datasets.Dataset.from_parquet(str(file))
            columns = {name: rows[name] for name in rows.column_names}
        else:
            held = pyarrow.parquet.read_table(file)
            columns = {name: held[name].to_pylist() for name in held.column_names}
    except pyarrow.ArrowException as error:
        raise DataError(f"{source} is not a Parquet file that can be read: {error}.") from error
    return Table(source, columns, fingerprint=state)
