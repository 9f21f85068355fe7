"""Every bundled config runs: parsed as it is, for a step, with a tiny model and tiny data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.cli_paths import bundled_configs, find_bundled
from tests.layouts import tiny_data, tiny_model

SHORT = {
    "accelerator": "cpu",
    "devices": "1",
    "max_steps": "1",
    "accumulate_grad_batches": "1",
    "val_check_interval": "1",
    "log_every_n_steps": "1",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the tiny models, each of which is made once."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", bundled_configs())
def test_every_bundled_config_runs(
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = find_bundled(name)
    assert path is not None
    content = yaml.safe_load(path.read_text())
    (tmp_path / "data").mkdir()
    arguments = [part for key in SHORT for part in (f"--trainer.{key}", SHORT[key])]
    # A warm-up of so many epochs is longer than the step.
    arguments += ["--model.warmup", "0"]
    arguments += tiny_data(content["data"], tmp_path / "data")
    if not content["model"]["init_args"]["model_name_or_path"].startswith("bundled:"):
        model = tiny_model(content["model"], models)
        arguments += ["--model.model_name_or_path", str(model)]
    main(["fit", "--config", name, *arguments])
    output = capsys.readouterr().out
    run = Path("outputs", name.rsplit("/", 1)[-1], "version_0")
    assert "best by val/" in output
    for made in ("checkpoints/best.ckpt", "merged/model.safetensors", "curves.png"):
        assert (run / made).exists(), made
        assert str(run / made).removesuffix("/model.safetensors") in output
