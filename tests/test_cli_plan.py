"""`lightning-lora plan` as its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.cli import main
from lightning_lora.memory import GIB
from tests.commands import imported, run_command

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def _rows(found: dict[str, Any]) -> dict[tuple[str, str | None, int], dict[str, Any]]:
    return {(row["method"], row["strategy"], row["gpus"]): row for row in found["rows"]}


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["plan", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_bundled_config_is_planned_and_nothing_is_written(tmp_path: Path) -> None:
    done = run_command(
        tmp_path, "plan", "--config", "quickstart", "--gpus", "1,2", "--memory", "24"
    )
    assert done.returncode == 0, done.stderr
    assert "Linear, r=8, alpha=16" in done.stdout
    assert "batches of 32 x 96 tokens, 32-true, AdamW" in done.stdout
    for label in ("full", "full DDP", "LoRA FSDP", "QLoRA", "fits 24"):
        assert label in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_all_that_is_printed_and_adds_up(tmp_path: Path) -> None:
    done = run_command(
        tmp_path, "plan", "--config", "quickstart", "--json", "--gpus", "2,1,2", "--lora.r", "4"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory_per_gpu"] == 80 * GIB
    assert found["parameters"]["full"]["trained"] == found["parameters"]["full"]["total"]
    head = 128 * 128 + 128 + 2 * 128 + 2
    factors = 4 * 4 * 4 * 2 * 128 + 4 * 2 * 4 * (128 + 384)
    assert found["parameters"]["lora"]["trained"] == head + factors
    rows = _rows(found)
    assert len(rows) == len(found["rows"]) == 3 * 3
    for row in rows.values():
        parts = ("weights", "gradients", "optimizer", "activations", "communication", "working")
        assert sum(row[part] for part in parts) == pytest.approx(row["total"], abs=6)
        assert row["fits"] == "yes"
    adam = rows["full", None, 1]
    assert adam["optimizer"] == 2 * adam["gradients"] == 8 * found["parameters"]["full"]["total"]


def test_a_llama_of_70b_fits_on_eight_cards_of_80_gb_with_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted from a folder with a config.json alone; two layers, so that it takes no time."""
    two = {**LLAMA_70B, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(two))
    arguments = (
        "--config",
        "instruct",
        f"--model.model_name_or_path={tmp_path}",
        "--model.dtype=bfloat16",
        "--trainer.precision=bf16-true",
        "--data.batch_size=1",
        "--data.max_length=1024",
    )
    found = _printed(capsys, *arguments, "--gpus", "1,8", "--memory", "20")
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    total = 2 * layer + 2 * 128256 * 8192 + 8192
    assert found["parameters"]["full"]["total"] == total
    rows = _rows(found)
    assert rows["full", None, 1]["weights"] == pytest.approx(2 * total, rel=1e-4)
    assert rows["full", None, 1]["fits"] == "no"
    assert rows["lora", "fsdp", 8]["fits"] == "yes"
    # Two gathered layers, and the embeddings and head that are in none.
    communication = rows["lora", "fsdp", 8]["communication"]
    assert communication == pytest.approx(2 * 2 * layer + 2 * 2 * 128256 * 8192, rel=0.01)
    assert rows["qlora", None, 1]["weights"] < rows["lora", None, 1]["weights"]


def test_settings_of_the_config_count(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        name: _rows(_printed(capsys, "--config", "quickstart", "--gpus", "1", *changed))
        for name, changed in {
            "plain": [],
            "batch": ["--data.batch_size", "64"],
            "length": ["--data.max_length", "48"],
            "checkpointing": ["--model.gradient_checkpointing", "true"],
            "mixed": ["--trainer.precision", "bf16-mixed"],
            "sgd": ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"],
        }.items()
    }

    def part(name: str, size: str, method: str = "lora") -> int:
        found: int = sizes[name][method, None, 1][size]
        return found

    assert part("batch", "activations") == pytest.approx(2 * part("plain", "activations"), rel=0.05)
    assert part("length", "activations") == pytest.approx(part("plain", "activations") / 2, rel=0.1)
    assert part("checkpointing", "activations") < part("plain", "activations") / 3
    assert part("mixed", "activations") < part("plain", "activations")
    assert part("sgd", "optimizer", "full") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "quikstart"], "did you mean quickstart?"),
        ([], "Which config? Give --config"),
        (
            ["--config", "quickstart", "--model.model_name_or_path", "./nowhere"],
            "There is no model folder ./nowhere",
        ),
        (
            ["--config", "quickstart", "--model.model_name_or_path", "."],
            "holds no config.json",
        ),
        (["--config", "quickstart", "--memory", "-1"], "--memory is '-1'"),
        (["--config", "quickstart", "--memory", "0"], "--memory is '0'"),
        (["--config", "quickstart", "--memory", "lots"], "--memory is 'lots'"),
        (["--config", "quickstart", "--memory", "nan"], "--memory is 'nan'"),
        (["--config", "quickstart", "--gpus", "0,2"], "--gpus is '0,2'"),
        (["--config", "quickstart", "--gpus", "two"], "--gpus is 'two'"),
        (["--config", "quickstart", "--gpus"], "expected one argument"),
        (["--config", "quickstart", "--lora.bogus", "4"], "Unknown key 'lora.bogus'"),
        (["--config", "quickstart", "--lora.r", "-1"], "r must be a whole number"),
        (
            ["--config", "quickstart", "--lora.target_modules", "[nothing]"],
            "'nothing' matched nothing",
        ),
        (["--config", "quickstart", "--trainer.precision", "7"], "precision"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error: ") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_code_two(tmp_path: Path) -> None:
    done = run_command(
        tmp_path, "plan", "--config", "quickstart", "--model.model_name_or_path", "./nowhere"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no model folder ./nowhere")
    assert "Traceback" not in done.stderr


def test_a_module_of_the_user_s_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        "model:\n  class_path: lightning.pytorch.demos.boring_classes.BoringModel\n"
    )
    with pytest.raises(SystemExit):
        main(["plan", "--config", "my.yaml"])
    assert "BoringModel, which is none of the recipes" in capsys.readouterr().err


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "lightning", "numpy", "rich", "jsonargparse", "yaml", "transformers")
    for arguments in (["plan", "--help"], ["plan", "--config", "quickstart", "--memory", "-3"]):
        found, done = imported(tmp_path, heavy, *arguments)
        assert found == []
        assert "--gpus N,N" in done.stdout or "--memory is '-3'" in done.stderr
