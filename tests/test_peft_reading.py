"""Folders in PEFT format as they come: old, incomplete, damaged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import inject_lora, load_adapter, save_adapter
from lightning_lora.adapters import read_adapter
from lightning_lora.errors import CheckpointError
from lightning_lora.injection import injection_of
from lightning_lora.stored import read_stored_adapter
from tests.test_interop import assert_same, bert, fresh, outputs, train_a_little

peft = pytest.importorskip(
    "peft", reason="PEFT is a peer to compare with, installed by the test extra"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = fresh(bert)
    inject_lora(model, r=2, alpha=6, target_modules=["query"])
    train_a_little(model)
    return save_adapter(model, tmp_path / "adapter")


def test_the_file_of_older_versions_is_read(tmp_path: Path, folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    theirs = peft.PeftModel.from_pretrained(fresh(bert), folder)
    model = fresh(bert)
    load_adapter(model, folder)
    assert_same(outputs(model), outputs(theirs))


class Harmful:
    def __reduce__(self) -> Any:
        return (Path("touched").touch, ())


@pytest.mark.parametrize(
    "content",
    [Harmful(), [1], {"a": 1}, {1: torch.ones(1)}],
    ids=["harmful", "list", "number", "no name"],
)
def test_nothing_in_that_file_is_executed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(folder)
    torch.save(content, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"could not be read: it is damaged \(adapter_model"):
        load_adapter(fresh(bert), folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(content)[:9])
    with pytest.raises(CheckpointError, match=r"could not be read: it is damaged \(adapter_model"):
        load_adapter(fresh(bert), folder)
    assert not (folder / "touched").exists()


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ([CONFIG], f"{CONFIG} is missing"),
        ([WEIGHTS], f"{WEIGHTS} is missing"),
        ([CONFIG, WEIGHTS], f"{CONFIG} and {WEIGHTS} are missing"),
    ],
)
def test_what_is_missing_is_named(folder: Path, files: list[str], missing: str) -> None:
    for file in files:
        (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"is no adapter folder: {missing}"):
        load_adapter(fresh(bert), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds no settings"),
        (b"5", "holds no settings"),
        (b"", "it is damaged"),
        (b'{"peft_type": "LORA", "x": "\xff\xfe"}', "it is damaged"),
        ({"r": "8"}, "r must be a whole number, got '8'"),
        ({"r": -1}, "has settings that cannot be: .*r must be"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_dropout": None}, "dropout must be in"),
        ({"rank_pattern": {"[": 3}}, r"rank_pattern: '\[' is not a valid regular expression"),
        ({"rank_pattern": [3]}, r"rank_pattern must map name patterns to a rank, got \[3\]"),
        ({"alpha_pattern": {"query": "2"}}, "alpha_pattern.*must be a number"),
        ({"target_modules": 7}, "target_modules must be .*got 7"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names"),
        ({"target_parameters": [3]}, "target_parameters must be a list of names"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a name"),
    ],
    ids=str,
)
def test_damaged_settings_are_one_error(folder: Path, content: Any, message: str) -> None:
    file = folder / CONFIG
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content}).encode()
    file.write_bytes(content)
    model = fresh(bert)
    for read in (lambda path: load_adapter(model, path), read_stored_adapter, read_adapter):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            read(folder)
    assert injection_of(model) is None


def test_what_the_settings_leave_out_is_as_in_peft(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh(bert), peft.LoraConfig(target_modules=["query"]))
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ("r", "lora_alpha", "target_modules"):
        del config[name]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = fresh(bert)
    plan = load_adapter(model, tmp_path)
    assert {(target.r, target.alpha) for target in plan.targets} == {(8, 8)}
    assert_same(outputs(model), outputs(theirs))
