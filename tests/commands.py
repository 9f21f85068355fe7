"""The command line driven as a user does, and modules of the tests run in processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_command(
    folder: Path, *arguments: str, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run `lightning-lora` with these arguments in a folder, offline."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_lora.cli", *arguments],
        cwd=folder,
        env={**os.environ, **_ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_module(
    name: str, arguments: object, processes: int = 1, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests, by torchrun where several processes are asked for.

    Args:
        name: Its name.
        arguments: Its one argument, put as JSON.
        processes: How many processes run it.
        timeout: Seconds it may take.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            *("-m", name),
            json.dumps(arguments),
        ],
        env={**os.environ, **_ENVIRONMENT},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def imported(
    folder: Path, heavy: Sequence[str], *arguments: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Which of these modules `lightning-lora` has imported when it ends with these arguments."""
    program = (
        "import sys\nfrom lightning_lora.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('\\n'.join(['heavy:', *(n for n in {tuple(heavy)} if n in sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.rpartition("heavy:")[2].split(), done
