"""Who is at work in a folder, told by a lock that children keep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.run_lock import holding, name_holder
from tests.commands import ROOT

pytest.importorskip("fcntl")

# A sweep whose fit sleeps: it writes down its pid, and then waits for longer than a test takes.
SWEEP = """
import sys, pathlib
from lightning_lora import sweep
from lightning_lora.cli import main
sleep = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
sweep.sys = type("sys", (), {"executable": sys.executable})
popen = sweep.subprocess.Popen
def start(command, **options):
    return popen([sys.executable, "-c", sleep], **options)
sweep.subprocess = type("subprocess", (), dict(
    Popen=start, STDOUT=sweep.subprocess.STDOUT, TimeoutExpired=sweep.subprocess.TimeoutExpired
))
main(["sweep", "--config", "quickstart", "--lora.r", "2", "--output", "out"])
"""


def start_sweep(folder: Path) -> tuple[subprocess.Popen[str], int]:
    (folder / "pid").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if (folder / "pid").is_file() and (folder / "pid").read_text():
            return process, int((folder / "pid").read_text())
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(process.communicate())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie waits for nobody but init.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_folder_is_held_by_one_alone(tmp_path: Path) -> None:
    with holding(tmp_path) as held:
        name_holder(held, 4711)
        with (
            pytest.raises(ConfigError, match=r"still at work.*\(kill 4711\)"),
            holding(tmp_path),
        ):
            pass
    with holding(tmp_path):
        pass


def test_a_child_holds_it_on(tmp_path: Path) -> None:
    with holding(tmp_path) as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=held)
    with pytest.raises(ConfigError, match="still at work"), holding(tmp_path):
        pass
    child.communicate(b"\n")
    with holding(tmp_path):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_sweep_that_is_terminated_ends_its_fit(tmp_path: Path) -> None:
    sweep, fit = start_sweep(tmp_path)
    sweep.terminate()
    sweep.communicate(timeout=60)
    assert sweep.returncode == 143
    assert not is_alive(fit)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_no_second_fit_runs_beside_that_of_a_sweep_that_was_killed(tmp_path: Path) -> None:
    sweep, fit = start_sweep(tmp_path)
    try:
        sweep.kill()
        sweep.communicate(timeout=60)
        assert is_alive(fit)
        with pytest.raises(AssertionError, match=rf"error: A fit of an .*\(kill {fit}\)"):
            start_sweep(tmp_path)
    finally:
        os.kill(fit, signal.SIGKILL)
