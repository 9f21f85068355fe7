"""`lightning-lora analyze` as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Its log handler keeps the stderr that it finds, which must not be that of a test.
import lightning.pytorch  # noqa: F401
import pytest
from safetensors.torch import save_file

from lightning_lora import cli_analyze, inject_lora, save_adapter
from lightning_lora.cli import main
from lightning_lora.study import SIDES
from tests.models import mlp
from tests.test_analysis import adapted, checkpoint

NAMES = ["fc1", "fc2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, the second one in both formats, and their base."""
    checkpoint(adapted(target_modules=NAMES, r=2), tmp_path / "small.ckpt")
    large = adapted(target_modules=NAMES, r=4, seed=5)
    checkpoint(large, tmp_path / "large.ckpt")
    save_adapter(large, tmp_path / "peft")
    (tmp_path / "base").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in mlp().state_dict().items()}
    save_file(weights, tmp_path / "base/model.safetensors")
    return tmp_path


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["analyze", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_tables_and_figures_in_a_process_of_its_own(folder: Path) -> None:
    command = [sys.executable, "-m", "lightning_lora.cli", "analyze", "small.ckpt", "peft"]
    (folder / "analysis").mkdir()
    (folder / "analysis/notes.txt").write_text("mine")
    done = subprocess.run(
        [*command, "--base", "base"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("small: the update of each layer", "small, peft", "amplification", "Wrote"):
        assert expected in done.stdout
    assert sorted(path.name for path in (folder / "analysis").iterdir()) == [
        "amplification.png",
        "analysis.json",
        "base.csv",
        "base_grid.csv",
        "base_peft.png",
        "base_small.png",
        "layers.csv",
        "notes.txt",
        "similarity.csv",
        "similarity_grid.csv",
        "similarity_small_peft.png",
        "singular_values.csv",
        "spectra.png",
    ]


def test_json_is_all_that_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    def found(*arguments: str) -> dict[str, Any]:
        main(["analyze", *arguments, "--output", "out", "--json"])
        printed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return printed

    same = found("large.ckpt", "peft", "--of", "output")
    assert same["adapters"] == ["large", "peft"] and same["directions_of"] == "output"
    for row in same["similarity"]:
        assert row["diagonal"] == pytest.approx([1] * 4)
        assert row["shared"] == 4
        assert row["expected_1_1"] == 1 / {"fc1": 10, "fc2": 8}[row["layer"]]
    assert same["base"] == [] and "--base FOLDER" in same["notes"][0]
    assert "out/base.csv" not in same["files"] and "out/similarity.csv" in same["files"]

    other = found("small.ckpt", "large.ckpt", "--base", "base", "--directions", "2")
    assert [row["diagonal"][-1] < 0.99 for row in other["similarity"]] == [True, True]
    for row in other["base"]:
        assert row["directions"] == 2
        assert row["on_delta"] <= row["on_weight"] <= row["weight_norm"]
    # The random matrices come from the seed alone.
    assert found("small.ckpt", "--base", "base") == found("small.ckpt", "--base", "base")
    seeded = found("small.ckpt", "--base", "base", "--seed", "1")
    assert seeded["base"][0]["on_random"] != other["base"][0]["on_random"]


@pytest.mark.filterwarnings("error")
def test_an_adapter_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    inject_lora(model, r=2, target_modules=NAMES)
    checkpoint(model, tmp_path / "new.ckpt")
    main(["analyze", "new.ckpt"])
    printed = capsys.readouterr().out
    assert printed.count("its update is zero") == 2
    assert (tmp_path / "analysis/spectra.png").is_file()


def test_the_sides_to_choose_from_are_those_of_a_study() -> None:
    assert cli_analyze._SIDES == SIDES


def test_mistakes_are_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert "analyze: the following arguments are required: CKPT" in _refused(capsys)
    assert "given twice" in _refused(capsys, "small.ckpt", "./small.ckpt")
    assert "invalid choice: 'C'" in _refused(capsys, "small.ckpt", "--of", "C")
    assert "Checkpoint not found: smal.ckpt" in _refused(capsys, "smal.ckpt")
    assert "peft holds no .safetensors" in _refused(capsys, "small.ckpt", "--base", "peft")
    assert "from 1 on" in _refused(capsys, "small.ckpt", "--directions", "0")
    assert "is a file" in _refused(capsys, "small.ckpt", "--output", "large.ckpt")
    (folder / "base/model.safetensors").write_bytes(b"no tensors")
    assert "damaged" in _refused(capsys, "small.ckpt", "--base", "base")
    assert "no adapter folder" in _refused(capsys, "base")
    assert "did you mean 'bundled:quickstart'" in _refused(
        capsys, "small.ckpt", "--base", "bundled:quikst"
    )
    assert not (folder / "analysis").exists()
