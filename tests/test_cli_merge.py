"""`lightning-lora merge` as its users run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_lora.cli import main
from tests.commands import imported, run_command
from tests.quantized import quantized_hugging_face
from tests.test_cli import CONFIG
from tests.test_offline_merging import Around, assert_equal, checkpoint, fitted, shake, tensors


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fit of the classification recipe in `outputs/tiny/version_0`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(CONFIG.format(model=tiny_model, data=tiny_data))
    done = run_command(folder, "fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr
    return folder


BEST = "outputs/tiny/version_0/checkpoints/best.ckpt"


def test_the_merged_folder_is_what_the_fit_exported(run: Path) -> None:
    done = run_command(run, "merge", BEST, "--output", "merged", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["base_check"] == "the same" and found["written"] and done.stderr == ""
    exported = run / "outputs/tiny/version_0/merged"
    assert_equal(tensors(run / "merged"), tensors(exported))
    configs, tokenizers = (
        [json.loads((folder / name).read_text()) for folder in (run / "merged", exported)]
        for name in ("config.json", "tokenizer.json")
    )
    assert configs[0] == configs[1] and configs[0]["id2label"]["2"] == "pos"
    # The fit's tokenizer also keeps how it truncated last.
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
    assert {path.name for path in exported.iterdir()} == set(found["files"])


def test_a_dry_run_checks_and_writes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    before = {*run.iterdir()}
    main(["merge", BEST, "--output", "dry", "--dry_run", "--dtype", "bf16"])
    printed = capsys.readouterr().out
    assert "(the same)" in printed and "BertForSequenceClassification, bfloat16" in printed
    assert "Nothing was written" in printed and {*run.iterdir()} == before


def test_a_folder_that_is_there_is_replaced_on_demand_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, _, path = fitted(tmp_path, "llama", {})
    output = tmp_path / "merged"
    output.mkdir()
    main(["merge", str(path), "--output", str(output)])
    (output / "stale.txt").write_text("")
    with pytest.raises(SystemExit):
        main(["merge", str(path), "--output", str(output)])
    assert "is there already" in capsys.readouterr().err
    main(["merge", str(path), "--output", str(output), "--force"])
    assert not (output / "stale.txt").exists() and (output / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_merged_as_it_was_before(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_lora import inject_lora

    base = tmp_path / "base"
    module = Around(quantized_hugging_face("llama", kind, base))
    module.inner.net.config._name_or_path = str(base)
    inject_lora(module, r=2, alpha=6, seed=1, train_layer_norms=True)
    shake(module)
    path = checkpoint(module, tmp_path / "a.ckpt")
    main(["merge", str(path), "--output", str(tmp_path / "merged"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "what is not quantized" in found["base_check"] and kind in found["notes"][0]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    # The same adapter on the base as it was.
    from tests.models import hugging_face
    from tests.test_offline_merging import live

    plain = hugging_face("llama")
    outer = Around(plain)
    inject_lora(outer, r=2, alpha=6, seed=1, train_layer_norms=True)
    shake(outer)
    assert_equal(tensors(tmp_path / "merged"), live(plain, outer, tmp_path / "live"))


def test_mistakes_end_with_code_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, base, path = fitted(tmp_path, "llama", {})
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.ckpt").write_bytes(path.read_bytes()[:999])
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").unlink()
    output = ("--output", str(tmp_path / "merged"))
    capsys.readouterr()
    for arguments, expected in (
        (["merge"], "the following arguments are required"),
        (["merge", str(tmp_path / "b.ckpt"), *output], "holds: a.ckpt, bad.ckpt"),
        (["merge", str(tmp_path / "bad.ckpt"), *output], "could not be read"),
        (["merge", str(path), "--output", str(tmp_path / "file")], "is a file"),
        (["merge", str(path), "--output", str(tmp_path / "file/x")], "cannot be written"),
        (["merge", str(path), *output, "--max_shard_size", "5 bananas"], "is no size"),
        (["merge", str(path), *output, "--base", str(other)], "config.json"),
        (["merge", str(path), *output, "--base", "./nowhere"], "no model folder"),
        (["merge", str(path), *output, "--dtype", "int8"], "invalid choice"),
        (["merge", str(base), *output], "is no adapter folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "merged").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy, done = imported(tmp_path, ("torch", "lightning", "numpy"), "merge", "--help")
    assert heavy == [] and "usage: lightning-lora merge" in done.stdout
