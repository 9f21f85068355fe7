"""The command as its users run it: what it does, what it writes, and what it says of mistakes."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.history import metrics_files, read_history
from tests.commands import ROOT, imported, run_command

CONFIG = """\
trainer:
  max_epochs: 2
  accelerator: cpu
model:
  class_path: TextClassifier
  init_args:
    model_name_or_path: {model}
data:
  class_path: ClassificationDataModule
  init_args:
    train_file: {data}/train.csv
    validation_file: {data}/validation.csv
    test_file: {data}/test.csv
lora:
  r: 4
"""


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path) -> str:
    return CONFIG.format(model=tiny_model, data=tiny_data)


@pytest.fixture(scope="module")
def fitted(config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which `fit --config tiny.yaml` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(config)
    done = run_command(folder, "fit", "--config", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_help_names_subcommands_and_configs(tmp_path: Path) -> None:
    done = run_command(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("fit", "validate", "test", "predict", "configs", "quickstart", "--ckpt_path"):
        assert word in done.stdout


def test_help_and_parsing_import_no_model_code(tmp_path: Path, config: str) -> None:
    (tmp_path / "tiny.yaml").write_text(config)
    heavy = ("transformers.modeling_utils", "datasets", "bitsandbytes")
    for arguments in (["fit", "--help"], ["fit", "--config", "tiny.yaml", "--print_config"]):
        found, done = imported(tmp_path, heavy, *arguments)
        assert found == []
        assert "--lora.r" in done.stdout or "r: 4" in done.stdout


def test_fit_writes_what_it_lists(fitted: tuple[Path, str]) -> None:
    folder, output = fitted
    run = folder / "outputs" / "tiny" / "version_0"
    for name in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "merged",
        "adapter",
        "metrics.csv",
        "config.yaml",
        "curves.png",
        "confusion_matrix.png",
    ):
        assert (run / name).exists(), name
        assert f"outputs/tiny/version_0/{name}" in output
    table = [line.strip("│ ").split() for line in output.splitlines() if "val/" in line]
    assert ["best", "by", "val/accuracy", "last"] in table
    assert [row[0] for row in table[-3:]] == ["val/accuracy", "val/f1", "val/loss"]
    assert all(len(row) == 3 for row in table[-3:])
    assert "lightning-lora test --ckpt_path outputs/tiny/version_0/checkpoints/best.ckpt" in output
    with (run / "metrics.csv").open() as stream:
        columns = csv.DictReader(stream).fieldnames or []
    assert {"val/loss", "val/accuracy", "val/f1"} <= set(columns)
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["class_names"] == ["neg", "neutral", "pos"]


def test_a_fresh_process_predicts_from_the_checkpoint_alone_and_the_export_agrees(
    fitted: tuple[Path, str], tiny_data: Path
) -> None:
    from transformers import pipeline

    folder, _ = fitted
    run = folder / "outputs" / "tiny" / "version_0"
    checkpoint = "outputs/tiny/version_0/checkpoints/best.ckpt"
    file = str(tiny_data / "predict.csv")
    done = run_command(folder, "predict", "--ckpt_path", checkpoint, "--data.predict_file", file)
    assert done.returncode == 0, done.stderr
    assert "outputs/tiny/version_0/predictions.csv" in done.stdout
    with (run / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 7
    merged = pipeline("text-classification", str(run / "merged"), top_k=None, device="cpu")
    for row, scores in zip(rows, merged([row["text"] for row in rows]), strict=True):
        assert scores[0]["label"] == row["predicted_label"]
        for score in scores:
            probability = float(row[f"probability_{score['label']}"])
            assert score["score"] == pytest.approx(probability, abs=1e-5)


def test_the_commands_checkpoint_loads_without_a_trainer(fitted: tuple[Path, str]) -> None:
    from lightning_lora import load_lightning_module
    from lightning_lora.recipes import TextClassifier

    run = fitted[0] / "outputs" / "tiny" / "version_0"
    module = load_lightning_module(TextClassifier, run / "checkpoints" / "best.ckpt")
    assert module.class_names == ["neg", "neutral", "pos"]
    assert not any("lora" in key for key in module.state_dict())


@pytest.fixture
def here(fitted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(fitted[0])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return fitted[0]


def test_scores_of_best_and_of_its_file_agree(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["test", "--config", "tiny.yaml", "--ckpt_path", "best"])
    named = capsys.readouterr().out
    main(["test", "--ckpt_path", "outputs/tiny/version_0/checkpoints/best.ckpt"])
    assert "test/accuracy" in named
    assert capsys.readouterr().out == named
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"])
    assert "val/accuracy" in capsys.readouterr().out


def test_a_second_fit_leaves_the_first_alone_and_resuming_goes_on_in_its_run(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "tiny.yaml").write_text(config)
    fit = ["fit", "--config", "tiny.yaml", "--output_dir", "runs", "--lora.export_dir", "null"]
    main([*fit, "--trainer.max_epochs", "1"])
    first = tmp_path / "runs" / "version_0"
    before = (first / "checkpoints" / "best.ckpt").read_bytes()
    main([*fit, "--trainer.max_epochs", "1"])
    assert (tmp_path / "runs" / "version_1" / "checkpoints" / "best.ckpt").exists()
    assert (first / "checkpoints" / "best.ckpt").read_bytes() == before
    assert not (first / "merged").exists()

    last = first / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    main([*fit, "--ckpt_path", str(last), "--trainer.max_epochs", "2"])
    assert torch.load(last, weights_only=True)["global_step"] == 6
    history = read_history(metrics_files(first))
    assert (first / "metrics_1.csv").exists(), "the metrics of the first part"
    assert [point.step for point in history["val/accuracy"]] == [3, 6]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["version_0", "version_1"]
    assert "runs/version_0/checkpoints/last.ckpt" in capsys.readouterr().out


def test_the_last_checkpoint_is_the_newest_where_the_best_does_not_improve(here: Path) -> None:
    options = ["--model.learning_rate", "0", "--trainer.max_epochs", "3", "--output_dir", "still"]
    main(["fit", "--config", "tiny.yaml", *options])
    folder = here / "still" / "version_0" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    steps = {
        path.stem: torch.load(path, weights_only=True)["global_step"] for path in folder.iterdir()
    }
    assert steps == {"best": 3, "last": 9}


def test_a_fit_without_a_validation_merges_its_last_weights(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", "tiny.yaml", "--output_dir", "short", "--trainer.max_steps", "1"])
    output = capsys.readouterr().out
    assert "last checkpoint" in output
    assert "best checkpoint (" not in output
    assert (here / "short" / "version_0" / "merged" / "model.safetensors").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / "outputs" / "tiny" / "version_0"
    names = ("config.yaml", "checkpoints/last.ckpt", "metrics.csv", "curves.png")
    kept = {name: (run / name).read_bytes() for name in names}
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                "--config",
                "tiny.yaml",
                "--lora.r",
                "8",
                "--ckpt_path",
                f"{run}/checkpoints/last.ckpt",
            ]
        )
    assert "r: 4 in the checkpoint, 8 now" in capsys.readouterr().err
    assert not (run / "metrics_1.csv").exists()
    assert kept == {name: (run / name).read_bytes() for name in kept}


def test_settings_on_the_command_line_go_before_the_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "tiny.yaml", "--lora.r", "16", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lora"]["r"] == 16
    assert printed["trainer"]["max_epochs"] == 2
    assert printed["seed_everything"] == 42


def test_another_optimizer_brings_no_values_of_adamw(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", *optimizer, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert printed["class_path"] == "torch.optim.SGD"
    assert printed["init_args"]["lr"] == 0.1
    assert printed["init_args"]["weight_decay"] == 0


def _edit(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (_edit("  r: 4", "  rr: 4"), [], "'lora.rr' (bad.yaml, line 15); did you mean 'lora.r'?"),
        (_edit("lora:", "lroa:"), [], "'lroa.r' (bad.yaml, line 15); did you mean 'lora.r'?"),
        (_edit("max_epochs", "max_epoch"), [], "line 2); did you mean 'trainer.max_epochs'?"),
        (_edit("train_file", "trainfile"), [], "line 11); did you mean 'data.train_file'?"),
        (_edit("TextClassifier", "TextClasifier"), [], "did you mean 'TextClassifier'?"),
        (_edit("r: 4", "r: four"), [], "'lora.r' (bad.yaml, line 15): expected int, got 'four'"),
        (_edit("r: 4", "r: [4"), [], "bad.yaml is no YAML file"),
        (_edit("train.csv", "trian.csv"), [], "did you mean 'train.csv'?"),
        (str, ["--trainer.max_epochs", "two"], "(command line): expected int or null, got 'two'"),
        (str, ["--model.learning_rat", "1"], "did you mean 'model.learning_rate'?"),
        (str, ["--bogus", "1"], "Unknown key 'bogus' (command line)"),
        (str, ["--lora.r", "-1"], "r must be"),
        (str, ["--lora.target_modules", "[quary]"], "query"),
        (str, ["--model.dtype", "flaot32"], "did you mean 'float32'?"),
        (str, ["--data.batch_size", "0"], "batch_size is 0"),
        (str, ["--data.label_column", "lable"], "did you mean 'label'?"),
        (str, ["--trainer.strategy", "nonsense"], "Settings of trainer"),
        (str, ["--ckpt_path", "no.ckpt"], "There is no checkpoint no.ckpt"),
        (str, ["--ckpt_path", "best"], "There is no best checkpoint below outputs/bad"),
        (str, ["--ckpt_path", "bad.yaml"], "bad.yaml"),
        (str, ["--ckpt_path"], "--ckpt_path needs a value"),
        (str, ["--data.train_file", "empty.csv"], "empty.csv holds column names and no rows"),
        (str, ["--data.validation_file", "blank.csv"], "blank.csv is empty"),
        (str, ["--data.train_file", "empty.csv", "--data.validation_file", "null"], "no rows"),
        (str, ["--model.metrics", "[accurcy]"], "did you mean 'accuracy'?"),
        (str, ["--model.model_name_or_path", "no-such/model"], "no-such/model cannot be loaded"),
        (str, ["--model.model_name_or_path", "t5"], "t5 is an encoder-decoder model"),
        (str, ["--data.problem_type", "regression"], "where a regression needs a number"),
        (_edit("train_file", "dataset: a/b #"), ["--data.validation_file", "null"], "not both"),
        (
            _edit("train_file", "dataset: no-such/data #"),
            ["--data.validation_file", "null", "--data.test_file", "null"],
            "The dataset no-such/data (default configuration) cannot be loaded",
        ),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    config: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[str], str],
    arguments: list[str],
    message: str,
) -> None:
    from transformers import T5Config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "bad.yaml").write_text(edit(config))
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "blank.csv").touch()
    shutil.copytree(tiny_model, tmp_path / "t5")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "bad.yaml", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    made = {path.name for path in tmp_path.iterdir()} - {"bad.yaml", "empty.csv", "blank.csv", "t5"}
    assert not made, "no empty run is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "did you mean 'fit'?"),
        (["fit"], "Which config?"),
        (["fit", "--config", "quikstart"], "did you mean quickstart?"),
    ],
)
def test_unfinished_commands_say_what_is_missing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_variable_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.errors import ConfigError

    monkeypatch.setenv("LIGHTNING_LORA_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="Unknown subcommand"):
        main(["fitt"])


def test_a_logger_without_room_is_no_defect(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_lora.recipes import TextClassifier

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

    monkeypatch.setattr(TextClassifier, "test_step", full)
    with pytest.raises(SystemExit):
        main(["test", "--config", "tiny.yaml", "--ckpt_path", "best"])
    error = capsys.readouterr().err
    assert "error: There is no room left: [Errno 28]" in error and "metrics.csv" in error


def test_defects_keep_their_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.recipes import TextClassifier

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(TextClassifier, "test_step", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["test", "--config", "tiny.yaml", "--ckpt_path", "best"])


def test_a_reader_that_leaves_is_no_defect(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lightning_lora.cli configs show quickstart | head -c 5"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}; sleep 1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(done.stdout) == 5 and done.stderr == ""


@pytest.mark.parametrize("name", ["merge", "fit"])
def test_sigterm_ends_commands_but_is_lightnings_in_a_fit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def run(*_: object) -> None:
        found.append(signal.getsignal(signal.SIGTERM))
        if name == "merge":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("lightning_lora.cli_merge.run_merge", run)
    monkeypatch.setattr("lightning_lora.cli_run.LoRACLI", run)
    before = signal.getsignal(signal.SIGTERM)
    if name == "merge":
        with pytest.raises(SystemExit) as ended:
            main(["merge"])
        assert ended.value.code == 143 and found != [before]
    else:
        main(["fit", "--config", "quickstart"])
        assert found == [before]
    assert signal.getsignal(signal.SIGTERM) == before
