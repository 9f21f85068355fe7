"""Plain text files as tables: one document a file, a paragraph, or a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning_lora.errors import DataError
from lightning_lora.recipes.cache import file_fingerprint, fingerprint
from lightning_lora.recipes.files import Table, collect_rows, resolve_path
from lightning_lora.recipes.readers import NumberedRows

DOCUMENTS = ("file", "paragraph", "line")
# Characters of a piece, less in a small file: a share of a text is held out in whole pieces.
_PIECE = 4096
_FEWEST_PIECES = 64
_LONGEST_READ = 2**16


def read_text_file(path: str, documents: str = "file", cache_dir: str | None = None) -> Table:
    """Read a text file in pieces, from a large file straight to disk.

    Args:
        path: The file, in UTF-8.
        documents: What a document is: the whole `file`, a `paragraph` between blank lines, or a
            `line`; blank lines are none.
        cache_dir: Where a large file's pieces are kept, as in `cached_rows`.

    Returns:
        A table with the columns `text`, and `continues`, which says of a piece whether its document
        goes on in the next row.

    Raises:
        DataError: If the file is missing, empty or not UTF-8.
    """
    file = resolve_path(path)
    if file.is_dir():
        raise DataError(f"{path} is a folder; name one file in it.")

    def rows() -> NumberedRows:
        pieces = _documents(file, path, documents) if documents != "file" else _cut(file, path)
        for number, text, continues in pieces:
            yield number, {"text": text, "continues": continues}

    state = fingerprint(["text", file_fingerprint(file), documents])
    table = collect_rows(rows, file, path, "line", state, cache_dir)
    # Goes no further than the first text, and through all of a file that is blank.
    if not len(table) or not any(text.strip() for text in table.columns["text"]):
        raise DataError(f"{path} is empty.")
    return table


def _lines(file: Path, source: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers; very long ones in several parts."""
    number = 1
    with file.open(encoding="utf-8-sig") as stream:
        while True:
            try:
                line = stream.readline(_LONGEST_READ)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source} is not UTF-8 text: near line {number} there is a byte "
                    f"{error.object[error.start]:#04x}. Convert the file, for example with `iconv "
                    "-f latin1 -t utf-8`."
                ) from error
            if not line:
                return
            yield number, line
            number += line.endswith("\n")


def _cut(file: Path, source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield one document in pieces that end with a line, and not among blank ones."""
    enough = min(_PIECE, file.stat().st_size // _FEWEST_PIECES)
    piece: list[str] = []
    size, first = 0, 1
    for number, line in _lines(file, source):
        between = bool(piece) and piece[-1].endswith("\n") and bool(line.strip())
        if piece and size >= (enough if between else _LONGEST_READ):
            yield first, "".join(piece), True
            piece, size = [], 0
        if not piece:
            first = number
        piece.append(line)
        size += len(line)
    if piece:
        yield first, "".join(piece), False


def _documents(file: Path, source: str, documents: str) -> Iterator[tuple[int, str, bool]]:
    lines: list[str] = []
    first = 1
    for number, line in _lines(file, source):
        whole = not lines or lines[-1].endswith("\n")
        if lines and whole and (documents == "line" or not line.strip()):
            yield first, "".join(lines).strip("\n"), False
            lines = []
        if line.strip() or not whole:
            if not lines:
                first = number
            lines.append(line)
    if lines:
        yield first, "".join(lines).strip("\n"), False
