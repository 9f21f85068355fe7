"""`lightning-lora sweep` as its users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_lora.cli import main
from tests.commands import imported, run_command
from tests.test_cli import CONFIG


@pytest.mark.slow
def test_a_sweep_runs_resumes_and_skips(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=tiny_model, data=tiny_data))
    command = ("sweep", "--config", "tiny.yaml", "--lora.r", "1,2", "--trainer.max_epochs", "1")
    done = run_command(tmp_path, *command, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "run 2/2  lora r=2 seed=42" in done.stderr
    found = json.loads(done.stdout)
    folder = tmp_path / "sweeps/tiny"
    one, two = found["rows"]
    # Two layers with six linear layers each, of width 32 (48 inside), and the pooler.
    assert two["trained"] - one["trained"] == 2 * (4 * 64 + 2 * 80) + 64
    checkpoint = next(folder.glob("*r=1*/version_0/checkpoints/best.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert one["trained"] == sum(tensor.numel() for tensor in state.values())
    assert 0 <= one["mean"] <= 1 and found["runs"][0]["metric"] == "val/accuracy"
    for name in ("sweep.csv", "sweep.md", "sweep.png", "sweep.json"):
        assert (folder / name).is_file()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    again = run_command(tmp_path, *command, "--json")
    assert json.loads(again.stdout) == found
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == times


def test_a_run_that_fails_stands_in_the_table_and_ends_with_code_1(tmp_path: Path) -> None:
    arguments = ("--config", "quickstart", "--output", "out", "--lora.target_modules", "[nowhere]")
    done = run_command(tmp_path, "sweep", *arguments)
    assert done.returncode == 1 and "failed" in done.stdout
    assert "1 of 1 runs failed" in done.stderr and "'nowhere' matched nothing" in done.stderr
    assert "matched nothing" in (tmp_path / "out/sweep.md").read_text()


def test_a_dry_run_lists_what_would_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "quickstart", "--lora.r", "1,2", "--seeds", "1,2", "--dry_run"]
    main(["sweep", *arguments, "--baselines", "bitfit"])
    printed = capsys.readouterr().out
    assert "6 runs in sweeps/quickstart, 0 finished" in printed and printed.count("to run") == 6
    main(["sweep", *arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["arguments"]["seed_everything"] == "1"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_code_2_and_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        ([], "the following arguments are required: --config"),
        (["--config", "quikstart"], "did you mean quickstart?"),
        (["--config", "quickstart", "--seeds", "one"], "Give whole numbers"),
        (["--config", "quickstart", "--baselines", "adapter"], "no baseline adapter"),
        (["--config", "quickstart", "--lora.r"], "needs a value"),
        (["--config", "quickstart", "--output", "file"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", *arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy, done = imported(tmp_path, ("torch", "lightning", "numpy"), "sweep", "--help")
    assert heavy == [] and "usage: lightning-lora sweep" in done.stdout
