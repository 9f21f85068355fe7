"""`lightning-lora export` as its users run it, and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_lora import inject_lora, save_adapter
from lightning_lora.cli import main
from lightning_lora.history import metrics_files, read_history
from lightning_lora.model_card import Card, card_text
from tests.commands import imported, run_command
from tests.models import hugging_face
from tests.test_cli import CONFIG
from tests.test_offline_merging import Around, assert_equal, checkpoint, fitted


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"bias": "all", "train_layer_norms": True}),
        ("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}}),
        ("gpt2", {"target_modules": "qv"}),
        ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("wav2vec2", {"target_modules": ["conv", "q_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "experts"]}),
    ],
)
def test_the_folder_is_that_of_save_adapter_and_needs_no_base(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    _, module, base, path = fitted(tmp_path, name, settings)
    expected = save_adapter(module, tmp_path / "expected", "inner.net")
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    main(["export", str(path), str(tmp_path / "out")])
    assert_equal(
        load_file(tmp_path / "out/adapter_model.safetensors"),
        load_file(expected / "adapter_model.safetensors"),
    )
    configs = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "out", expected)
    ]
    assert configs[0] == configs[1]


def test_peft_computes_what_the_checkpoint_computes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is a peer to compare with")
    model, _, _, path = fitted(tmp_path, "bert", {})
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    main(["export", str(path), str(tmp_path / "out")])
    theirs = peft.PeftModel.from_pretrained(hugging_face("bert"), tmp_path / "out").eval()
    with torch.no_grad():
        found = theirs(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_card_of_a_run_tells_settings_data_and_scores(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=tiny_model, data=tiny_data))
    done = run_command(tmp_path, "fit", "--config", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs/tiny/version_0"
    best = "outputs/tiny/version_0/checkpoints/best.ckpt"
    done = run_command(tmp_path, "export", best, "adapter", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= set(found["files"])
    assert_equal(
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
        load_file(run / "adapter/adapter_model.safetensors"),
    )
    card = (tmp_path / "adapter/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft" and "lora" in metadata["tags"]
    assert metadata["pipeline_tag"] == "text-classification"
    assert "base_model" not in metadata  # a folder is no name on the hub
    assert str(tiny_model) not in body and "num_labels=3" in body
    step = torch.load(tmp_path / best, weights_only=True)["global_step"]
    points = read_history(metrics_files(run))["val/accuracy"]
    score = next(point.value for point in points if point.step == step)
    assert f"| val/accuracy | {score:.4g} |" in body and f"global step {step}" in body
    for expected in ("| r | 4 |", "| learning_rate | ", "train.csv"):
        assert expected in body, expected
    exported = (run / "adapter/README.md").read_text()
    for expected in ("| val/accuracy | ", "| r | 4 |", "| learning_rate | "):
        assert expected in exported, expected


def test_the_card_names_a_base_on_the_hub_and_is_kept_once_written(tmp_path: Path) -> None:
    text = card_text(
        Card("org/model-1", {"task_type": "CAUSAL_LM"}, {"r": 8}, 10, scores={"a|b": 0.51234})
    )
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "org/model-1" and head["pipeline_tag"] == "text-generation"
    assert "base_model:adapter:org/model-1" in head["tags"]
    assert "| a\\|b | 0.5123 |" in text
    model = hugging_face("bert")
    inject_lora(model, r=2)
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a/README.md").write_text("My own words.")
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "My own words."


def test_mistakes_end_with_code_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, module, _, path = fitted(tmp_path, "llama", {})
    folder = save_adapter(module, tmp_path / "peft", "inner.net")
    tied = Around(hugging_face("albert"))
    inject_lora(tied, r=2)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.ckpt").write_bytes(path.read_bytes()[:999])
    outside = Around(hugging_face("bert"))
    outside.head = torch.nn.Linear(16, 3)
    inject_lora(outside, r=2, modules_to_save=["head"])
    other = checkpoint(outside, tmp_path / "outside.ckpt")
    out = str(tmp_path / "out")
    capsys.readouterr()
    for arguments, expected in (
        (["export", str(path)], "the following arguments are required: DIR"),
        (["export", str(tmp_path / "b.ckpt"), out], "Checkpoint not found"),
        (["export", str(tmp_path / "bad.ckpt"), out], "could not be read"),
        (["export", str(folder), out], "in PEFT format already"),
        (["export", str(other), out], "trains something outside of it"),
        (["export", str(path), str(folder)], "is there already"),
        (["export", str(path), str(tmp_path / "file")], "is a file"),
        (["export", str(path), str(tmp_path / "file/x")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "out").exists()
    main(["export", str(path), out, "--dry_run"])
    assert "Nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy, done = imported(tmp_path, ("torch", "lightning", "numpy"), "export", "--help")
    assert heavy == [] and "usage: lightning-lora export" in done.stdout


def test_an_adapter_that_diverged_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, path = fitted(tmp_path, "bert", {})
    stored = torch.load(path, weights_only=True)
    name = next(name for name in stored["state_dict"] if name.endswith("lora.B"))
    stored["state_dict"][name].fill_(float("inf"))
    torch.save(stored, path)
    with pytest.raises(SystemExit):
        main(["export", str(path), str(tmp_path / "out")])
    assert f"{name} holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
