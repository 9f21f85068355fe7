"""The command line, driven as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_command(
    folder: Path, *arguments: str, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run `lightning-lora` with these arguments in a folder, offline."""
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "lightning_lora.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
