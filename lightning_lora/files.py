"""Nothing is ever half-written: files and folders grow beside their target and are renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.errors import CheckpointError, first_line


def is_full_disk(error: BaseException) -> bool:
    """Whether what went wrong in writing somewhere is that there was no room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors has an error of its own.
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)


@contextmanager
def _explaining_full_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries have errors of their own for it
        if not is_full_disk(error):
            raise
        why = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(
            f"{target} was not written: there is no room left ({why}). What was "
            "there before is as it was. Make room and run it again (a fit goes on from its last "
            "checkpoint), or choose another place."
        ) from error


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


@contextmanager
def replacing_directory(target: str | Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` that takes its place when the block ends well, and vanishes
    when not.

    What stood at ``target`` before stays until the new folder is complete.

    Raises:
        NotADirectoryError: ``target`` is a file.
        CheckpointError: The disk is full.
    """
    target = Path(target)
    if not target.name:
        # The working directory, which cannot be replaced by its relative name.
        target = target.absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"{target} is a file; a folder is to be written there. Choose another path."
        )
    with _explaining_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            yield fresh
            adopt(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


@contextmanager
def replacing_file(target: str | Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; the file takes its place when the block ends well, and
    vanishes when not.

    The folder is made where it is missing.

    Raises:
        IsADirectoryError: ``target`` is a folder.
        CheckpointError: The disk is full.
    """
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(
            f"{target} is a folder; a file is to be written there. Choose another path."
        )
    fresh = target.with_name(f"{_prefix(target)}{os.getpid()}")
    with _explaining_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield fresh
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    """What the names of things beside a target begin with; a name has 255 bytes at most."""
    return f".{target.name.encode()[:200].decode(errors='ignore')}."


def adopt(fresh: Path, target: Path) -> None:
    """Put a complete new folder in the place of ``target``."""
    _make_readable(fresh)
    if not target.exists():
        fresh.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}old.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            fresh.rename(target)
        except BaseException:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Give everything the permissions of new files: mkdtemp and safetensors make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
