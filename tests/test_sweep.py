"""The grid of a sweep, what is carried out of it, and what is made of the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lightning_lora import sweep
from lightning_lora.errors import ConfigError
from lightning_lora.sweep import Result, Run, finished, make_grid, read_keys, run_grid
from lightning_lora.sweep_results import gather, write_sweep


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text("trainer: {}\n")
    return str(path)


def test_the_grid_is_every_combination_with_every_seed_and_baselines_once(config: str) -> None:
    keys = {
        "lora.r": "1,8",
        "lora.target_modules": "qv;[query,key]",
        "trainer.max_epochs": "2",
        "full.model.learning_rate": "0.1,0.2",
    }
    grid = make_grid(config, keys, [1, 2], ["linear_probe", "bitfit", "full"])
    lora = [run for run in grid if run.method == "lora"]
    assert [(r.settings["lora.r"], r.settings["lora.target_modules"], r.seed) for r in lora] == [
        (r, targets, seed) for r in "18" for targets in ("qv", "[query,key]") for seed in (1, 2)
    ]
    assert {run.arguments["trainer.max_epochs"] for run in grid} == {"2"}
    assert all("trainer.max_epochs" not in run.settings for run in grid)
    others = {m: [r for r in grid if r.method == m] for m in ("linear_probe", "bitfit", "full")}
    assert [len(found) for found in others.values()] == [2, 2, 4]
    assert all(run.arguments["lora.r"] == "0" for found in others.values() for run in found)
    assert {run.arguments["lora.bias"] for run in others["bitfit"]} == {"all"}
    assert {run.arguments["lora.modules_to_save"] for run in others["full"]} == {"[model]"}
    assert {run.arguments["model.learning_rate"] for run in others["full"]} == {"0.1", "0.2"}
    assert all("model.learning_rate" not in run.arguments for run in lora)
    assert len({run.name for run in grid}) == len(grid)
    assert all("/" not in run.name and len(run.name) <= 110 for run in grid)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["8"], "is no option"),
        (["--lora.r"], "needs a value"),
        (["--lora.r", "1", "--lora.r=2"], "given twice"),
    ],
)
def test_a_command_line_that_is_not_understood(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_keys(arguments)


def test_baselines_that_are_unknown_or_not_asked_for(config: str) -> None:
    with pytest.raises(ConfigError, match="no baseline adapter"):
        make_grid(config, {}, [1], ["adapter"])
    with pytest.raises(ConfigError, match="that --baselines does not name"):
        make_grid(config, {"full.model.learning_rate": "1"}, [1], [])
    with pytest.raises(ConfigError, match="empty value"):
        make_grid(config, {"lora.r": "1,,2"}, [1], [])


class Fits:
    """Stands in for the process of a fit: counts calls, and does what the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path | None]] = []
        self.codes: list[int] = []
        monkeypatch.setattr(sweep, "_fit", self.fit)
        monkeypatch.setattr("lightning_lora.sweep_results.read_result", self.read)

    def fit(self, run: Run, folder: Path, checkpoint: Path | None, _: tuple[int, ...]) -> int:
        self.calls.append((run.name, checkpoint))
        if checkpoint is None:
            (folder / "version_0/checkpoints").mkdir(parents=True)
        (folder / "version_0/checkpoints/last.ckpt").write_text("state")
        (folder / "version_0/checkpoints/best.ckpt").write_text("state")
        (folder / sweep.LOG).write_text("noise\nerror: the cause\n")
        return self.codes.pop(0) if self.codes else 0

    def read(self, run: Run, folder: Path, seconds: float) -> Result:
        return Result(run.method, dict(run.settings), run.seed, "val/accuracy", "max", 0.5)


def test_what_is_finished_is_not_carried_out_again(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = Fits(monkeypatch)
    grid = make_grid(config, {"lora.r": "1,2"}, [1], [])
    folder = tmp_path / "sweep"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="Another sweep is at work"):
        run_grid(grid, folder, lambda *_: None)
    assert fits.calls == []
    first = run_grid(grid, folder, lambda *_: None)
    assert [name for name, _ in fits.calls] == [run.name for run in grid]
    assert run_grid(grid, folder, lambda *_: None) == first and len(fits.calls) == 2
    kept = sorted(path.name for path in (folder / grid[0].name).rglob("*.ckpt"))
    assert kept == ["best.ckpt"]
    # A longer grid carries out what is new, another config everything.
    more = make_grid(config, {"lora.r": "1,2,4"}, [1], [])
    run_grid(more, folder, lambda *_: None)
    assert [name for name, _ in fits.calls[2:]] == [more[2].name]
    Path(config).write_text("trainer: {max_epochs: 9}\n")
    assert finished(grid[0], folder) is None
    run_grid(grid, folder, lambda *_: None)
    assert len(fits.calls) == 5 and all(checkpoint is None for _, checkpoint in fits.calls)


def test_an_interrupted_run_resumes_and_begins_anew_where_it_cannot(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = Fits(monkeypatch)
    (run,) = make_grid(config, {"lora.r": "1"}, [1], [])
    folder = tmp_path / "sweep"
    folder.mkdir()
    fits.codes = [1]
    (failed,) = run_grid([run], folder, lambda *_: None)
    assert failed.error == "exit code 1: the cause" and failed.score is None
    assert finished(run, folder) is None
    (result,) = run_grid([run], folder, lambda *_: None)
    last = folder / run.name / "version_0/checkpoints/last.ckpt"
    assert result.error is None and fits.calls[-1] == (run.name, last)
    (folder / run.name / sweep.RESULT).unlink()
    last.write_text("half a ch")
    fits.codes = [1, 0]
    (again,) = run_grid([run], folder, lambda *_: None)
    assert again.error is None and [c for _, c in fits.calls[-2:]] == [last, None]


def results() -> list[Result]:
    found = []
    for r, trained in (("1", 100), ("8", 800)):
        for seed in (1, 2, 3):
            score = 0.5 + int(r) / 100 + seed / 1000
            settings = {"lora.r": r, "lora.target_modules": "q|v"}
            scores = {"val/accuracy": score, "val/loss": 1.0}
            found.append(
                Result("lora", settings, seed, "val/accuracy", "max", score, scores, trained, seed)
            )
    found.append(Result("full", {}, 1, "val/accuracy", "max", 0.9, {"val/accuracy": 0.9}, 10**6, 5))
    found.append(Result("full", {}, 2, error="exit code 2: out of memory"))
    return found


def test_rows_are_means_over_seeds_and_failures_stand_in_the_table(tmp_path: Path) -> None:
    rows = gather(results())
    assert [(row.method, len(row.scores)) for row in rows] == [
        ("lora", 3),
        ("lora", 3),
        ("full", 1),
    ]
    assert rows[0].mean == pytest.approx(0.512) and rows[0].deviation == pytest.approx(0.001)
    assert rows[0].seconds == 2 and rows[2].deviation is None
    files = write_sweep(results(), tmp_path)
    assert [path.name for path in files] == ["sweep.csv", "sweep.json", "sweep.md", "sweep.png"]
    with files[0].open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 8 and lines[3]["lora.r"] == "8" and lines[3]["val/accuracy"] == "0.581"
    assert lines[-1]["error"] == "exit code 2: out of memory"
    found: dict[str, Any] = json.loads(files[1].read_text())
    assert len(found["rows"]) == 3 and found["runs"][0]["scores"]["val/loss"] == 1.0
    text = files[2].read_text()
    assert "| lora | 8 | q\\|v | 800 | 0.582 |" in text and "seed 2: exit code 2" in text
    assert files[3].read_bytes().startswith(b"\x89PNG") and files[3].stat().st_size > 10_000


def test_a_sweep_of_failures_draws_nothing(tmp_path: Path) -> None:
    files = write_sweep([Result("lora", {}, 1, error="exit code 1: no")], tmp_path)
    assert "sweep.png" not in [path.name for path in files]
    assert "failed" in (tmp_path / "sweep.md").read_text()
