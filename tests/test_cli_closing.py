"""What a command leaves behind: figures, and what its closing block says of them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from lightning_lora import cli_closing
from lightning_lora.cli import _message_of, main
from lightning_lora.cli_closing import KeepConfusion, confusion_of
from lightning_lora.confusion import MOST_CLASSES
from lightning_lora.errors import DataError
from lightning_lora.history import Point, best_point, metrics_files, read_history
from tests.commands import run_command
from tests.test_cli import CONFIG


@pytest.fixture
def here(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to run in, with a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=tiny_model, data=tiny_data))
    return tmp_path


FIT = ["fit", "--config", "tiny.yaml", "--lora.export_dir", "null"]


def test_the_matrices_are_those_of_the_best_validation_and_of_the_test(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli_closing, "draw_confusion_matrix", lambda *given: calls.append(given))
    # After a good first epoch the rate is so high that the rest is worse.
    main([*FIT, "--model.learning_rate", "0.5", "--model.schedule", "constant"])
    run = Path("outputs/tiny/version_0")
    history = read_history(metrics_files(here / run))
    best = best_point(history["val/accuracy"], "max")
    assert best is not None
    ((counts, names, path, title),) = calls
    assert names == ["neg", "neutral", "pos"]
    assert path == run / "confusion_matrix.png"
    assert title == f"Validation, best checkpoint (epoch {best.epoch}, step {best.step})"
    assert counts.sum(dim=1).tolist() == [8, 8, 8]
    assert float(counts.trace()) / 24 == pytest.approx(best.value)
    capsys.readouterr()

    checkpoint = run / "checkpoints" / "best.ckpt"
    main(["test", "--ckpt_path", str(checkpoint)])
    counts, _, path, title = calls[-1]
    assert (path, title) == (run / "confusion_matrix_test.png", f"Test\n{checkpoint}")
    shown = capsys.readouterr().out
    assert f"{float(counts.trace()) / 24:.4f}" in shown
    assert [line.strip("│ ").split() for line in shown.splitlines()][1] == ["metric", "value"]


def test_the_block_lists_the_figure_of_a_test(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*FIT, "--trainer.max_steps", "1"])
    main(["test", "--config", "tiny.yaml", "--ckpt_path", "last"])
    path = "outputs/tiny/version_0/confusion_matrix_test.png"
    assert path in capsys.readouterr().out
    assert (here / path).exists()


def test_a_failure_to_draw_does_not_cost_the_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    for name in ("draw_curves", "draw_confusion_matrix"):
        monkeypatch.setattr(cli_closing, name, fail)
    with (
        pytest.warns(UserWarning, match="The curves could not be drawn: RuntimeError: no font"),
        pytest.warns(UserWarning, match="The confusion matrix could not be drawn"),
    ):
        main([*FIT, "--trainer.max_epochs", "1"])
    output = capsys.readouterr().out
    assert "best.ckpt" in output
    assert "curves.png" not in output
    assert not list(here.rglob("*.png"))


def test_a_regression_is_chosen_by_its_own_metric_and_has_no_matrix(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("train", 24), ("validation", 12)):
        with (here / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([["the film was good", row / 7] for row in range(rows)])
    files = ["--data.train_file", "train.csv", "--data.validation_file", "validation.csv"]
    problem = ["--data.problem_type", "regression", "--data.test_file", "null"]
    main([*FIT, *files, *problem, "--data.metrics", "[mse]"])
    output = capsys.readouterr().out
    assert "best by val/mse" in output
    assert "curves.png" in output
    assert "confusion" not in output
    assert "lightning-lora test" not in output, "there are no test data"
    assert "lightning-lora predict" in output


def test_a_fit_without_validation_names_its_last_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*FIT, "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1"])
    output = capsys.readouterr().out
    assert "train/loss" in output
    assert "best" not in output
    assert "curves.png" in output
    assert "score the last checkpoint" in output


def test_without_a_logger_the_fit_still_closes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*FIT, "--trainer.logger", "false", "--trainer.max_epochs", "1"])
    output = capsys.readouterr().out
    assert "val/accuracy" in output
    assert "curves.png" not in output
    assert "best.ckpt" in output


def test_predictions_go_to_a_file_of_the_models_kind(
    here: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lightning_lora.recipes import TextClassifier

    main([*FIT, "--trainer.max_steps", "1"])
    monkeypatch.setattr(TextClassifier, "predictions_suffix", ".jsonl", raising=False)
    file = ["--data.predict_file", str(tiny_data / "predict.csv")]
    main(["predict", "--config", "tiny.yaml", "--ckpt_path", "last", *file])
    path = "outputs/tiny/version_0/predictions.jsonl"
    assert path in capsys.readouterr().out
    assert len((here / path).read_text().splitlines()) == 7


@pytest.mark.slow
def test_two_ranks_draw_and_close_once(here: Path) -> None:
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    done = run_command(here, *FIT, *ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fit ─") == 1
    assert done.stdout.count("confusion_matrix.png") == 1
    run = here / "outputs" / "tiny" / "version_0"
    assert sorted(path.name for path in run.glob("*.png")) == ["confusion_matrix.png", "curves.png"]
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    counts = kept["KeepConfusion"]["best"]["counts"]
    assert counts.sum(dim=1).tolist() == [8, 8, 8], "every row of the data once, over both ranks"


class _Counting:
    """Stands for a classifier."""

    def __init__(self) -> None:
        self.confusion: dict[str, torch.Tensor] = {}


def _validate(keeper: KeepConfusion, scores: list[float], mode: str = "max") -> None:
    checkpoint = ModelCheckpoint(monitor="val/f1", mode=mode)
    model: Any = _Counting()
    model.confusion["val"] = torch.zeros(2, 2)
    for number, score in enumerate(scores):
        trainer: Any = SimpleNamespace(
            sanity_checking=False,
            checkpoint_callback=checkpoint,
            callback_metrics={"val/f1": torch.tensor(score)},
            global_step=10 * (number + 1),
            current_epoch=number,
        )
        model.confusion["val"].fill_(number)
        keeper.on_validation_end(trainer, model)
    trainer.sanity_checking = True
    model.confusion["val"].fill_(9)
    keeper.on_validation_end(trainer, model)


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 3)])
def test_the_first_best_validation_is_kept(mode: str, best: int) -> None:
    keeper = KeepConfusion()
    _validate(keeper, [0.5, 0.75, 0.75, 0.25, float("nan")], mode)
    assert keeper.best is not None
    assert keeper.last is not None
    assert keeper.best[0].step == 10 * (best + 1)
    assert keeper.best[1].tolist() == [[best, best], [best, best]]
    assert keeper.last[0].epoch == 5
    assert keeper.last[1].tolist() == [[4, 4], [4, 4]]


def test_what_is_kept_survives_a_checkpoint(tmp_path: Path) -> None:
    keeper, resumed = KeepConfusion(), KeepConfusion()
    assert keeper.state_dict() == {}
    _validate(keeper, [0.75, 0.5])
    torch.save(keeper.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.best is not None
    assert resumed.best[0] == Point(10, 1, 0.75)
    assert resumed.best[1].tolist() == [[0, 0], [0, 0]]
    _validate(resumed, [0.625, 0.875])
    assert resumed.best[0].step == 20


@pytest.mark.parametrize(
    "confusion",
    [None, {}, {"test": torch.ones(2, 2)}, torch.nn.Identity(), {"val": torch.ones(500, 500)}],
)
def test_models_without_a_matrix_to_draw_have_none(confusion: Any) -> None:
    assert MOST_CLASSES < 500
    assert confusion_of(SimpleNamespace(confusion=confusion), "val") is None


class _Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> int:
        raise DataError("a.csv, line 3: no label.\nFill it in.")


def test_what_a_worker_finds_is_said_without_its_traceback() -> None:
    with pytest.raises(DataError) as caught:
        list(DataLoader(_Broken(), num_workers=1))
    assert "Traceback" in str(caught.value)
    assert _message_of(caught.value) == "a.csv, line 3: no label.\nFill it in."
