"""A recipe under `--trainer.strategy fsdp2` on two ranks, with nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_lora.cli_paths import find_bundled
from tests.commands import run_command
from tests.layouts import tiny_data, tiny_model


def command(folder: Path, *arguments: str) -> str:
    done = run_command(folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_fit_test_and_predict_with_generated_texts(tmp_path: Path) -> None:
    path = find_bundled("e2e_gpt2")
    assert path is not None
    config = yaml.safe_load(path.read_text())
    (tmp_path / "data").mkdir()
    settings = {
        "trainer.strategy": "fsdp2",
        "trainer.accelerator": "cpu",
        "trainer.devices": "2",
        "trainer.max_steps": "2",
        "trainer.accumulate_grad_batches": "1",
        "trainer.val_check_interval": "1",
        "trainer.log_every_n_steps": "1",
        "model.warmup": "0",
        "model.max_new_tokens": "6",
        "model.model_name_or_path": str(tiny_model(config["model"], tmp_path)),
        "data.eval_batch_size": "5",
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    arguments += tiny_data(config["data"], tmp_path / "data")
    output = command(tmp_path, "fit", "--config", "e2e_gpt2", *arguments)
    run = tmp_path / "outputs/e2e_gpt2/version_0"
    assert "val/perplexity" in output and "Samples after the fit" in output
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert all(".lora." in name for name in checkpoint["state_dict"])

    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    base = AutoModelForCausalLM.from_pretrained(settings["model.model_name_or_path"])
    changed = [
        name
        for name, tensor in base.state_dict().items()
        if not torch.equal(merged.state_dict()[name], tensor)
    ]
    assert changed and all("c_" in name for name in changed)

    best = str(run / "checkpoints/best.ckpt")
    command(tmp_path, "merge", best, "--output", "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(again[name], tensor)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config == json.loads((run / "merged/config.json").read_text())
    command(tmp_path, "export", best, "adapter")
    exported = load_file(run / "adapter/adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert torch.equal(exported[name], tensor)
    assert "test/bleu" in command(tmp_path, "test", "--ckpt_path", best)
    rows = (tmp_path / "data/test.csv").read_text().splitlines()[:12]
    # Eleven rows: six for one rank, in two batches, and five for the other.
    (tmp_path / "new.csv").write_text("\n".join(rows) + "\n")
    command(tmp_path, "predict", "--ckpt_path", best, "--data.predict_file", "new.csv")
    (written,) = run.parent.rglob("predictions*.jsonl")
    assert len([json.loads(line) for line in written.open()]) == 11
