"""Prepared rows on disk: made once for the same inputs, memory-mapped by every run and rank."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_lora.errors import CheckpointError, DataError
from lightning_lora.files import replacing_directory

CACHE_VARIABLE = "LIGHTNING_LORA_CACHE"
_FORMAT = 1
_ROWS = "rows.arrow"


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the folder of prepared rows.

    Args:
        cache_dir: The user's choice; else `$LIGHTNING_LORA_CACHE`, else `lightning_lora` in the
            user's folder for caches.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lightning_lora"


def fingerprint(parts: Iterable[Any]) -> str:
    """Return the same 32 hexadecimal digits for the same primitives, lists and dictionaries.

    >>> fingerprint(["a", 1]) == fingerprint(["a", 1]) != fingerprint(["a", 2])
    True
    """
    text = json.dumps(list(parts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_fingerprint(path: str | Path) -> str:
    """Return a fingerprint of a file that changes when it is written again.

    Args:
        path: The file; its place, size and time of change are taken, so that large files need not
            be read.
    """
    file = Path(path).resolve()
    state = file.stat()
    return fingerprint([str(file), state.st_size, state.st_mtime_ns])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a fingerprint of what a tokenizer makes of texts, its chat template included.

    Args:
        tokenizer: A tokenizer of `transformers`, fast or slow.
    """
    parts = [type(tokenizer).__name__, getattr(tokenizer, "chat_template", None)]
    # Model-dependent things outside the backend: what special tokens are and where they stand.
    parts += [repr(tokenizer.special_tokens_map), tokenizer.padding_side, tokenizer.truncation_side]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call; they are set anew by each.
        backend.pop("truncation", None)
        backend.pop("padding", None)
        parts.append(backend)
    else:
        parts += [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs))]
    return fingerprint(parts)


def cached_rows(
    parts: Iterable[Any],
    build: Callable[[], Iterator[dict[str, Any]]],
    cache_dir: str | None = None,
) -> Any:
    """Return rows as a memory-mapped `datasets.Dataset`, prepared on the first call for `parts`.

    One process prepares them, others that want the same wait; a preparation that fails leaves
    nothing behind.

    Args:
        parts: Everything that settles the rows: fingerprints of files and tokenizer, settings.
        build: Yields the rows, all with the same columns; called only when they are not there.
        cache_dir: As in `cache_folder`.

    Raises:
        DataError: If there are no rows, or they cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = cached_rows(["doc"], lambda: iter([{"x": 1}, {"x": 2}]), folder)
        ...     again = cached_rows(["doc"], lambda: 1 / 0, folder)
        ...     rows["x"][:] == again["x"][:]
        True
    """
    import datasets
    from filelock import FileLock

    root = cache_folder(cache_dir)
    folder = root / fingerprint([_FORMAT, *parts])
    try:
        if not (folder / _ROWS).exists():
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{folder.name}.lock"):
                if not (folder / _ROWS).exists():
                    with replacing_directory(folder) as fresh:
                        _write(fresh / _ROWS, build)
    except (OSError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        raise DataError(
            f"Prepared data cannot be kept in {root}: {getattr(cause, 'strerror', None) or cause}. "
            f"Make room or choose another folder with data.cache_dir or ${CACHE_VARIABLE}."
        ) from error
    return datasets.Dataset.from_file(str(folder / _ROWS))


def _write(path: Path, build: Callable[[], Iterator[dict[str, Any]]]) -> None:
    from datasets.arrow_writer import ArrowWriter, SchemaInferenceError

    with ArrowWriter(path=str(path)) as writer:
        try:
            for row in build():
                writer.write(row)
            writer.finalize()
        except SchemaInferenceError as error:
            raise DataError("The data hold no row that can be used.") from error
