"""A lock on a folder that outlives the process that took it, as long as its children run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".running"


@contextmanager
def holding(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a folder, together with the processes that are given the file descriptors.

    Args:
        folder: The folder.

    Yields:
        File descriptors for ``pass_fds`` of `subprocess.Popen`. A process that has them holds the
        folder until it ends, even if this one is killed.

    Raises:
        ConfigError: Another process holds the folder.
    """
    if fcntl is None:
        yield ()
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ConfigError(
                f"A fit of an earlier sweep is still at work in {folder}. Wait for it"
                + (f", or end it (kill {pid})." if pid else ".")
            ) from None
        yield (descriptor,)
    finally:
        os.close(descriptor)


def name_holder(descriptors: tuple[int, ...], pid: int) -> None:
    """Write down who is at work, for the message of those who come later."""
    for descriptor in descriptors:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{pid}\n".encode(), 0)
