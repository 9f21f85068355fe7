from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_lora import inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.pretrained import fill_parameters, missing_parameters, pretrained_on_meta
from lightning_lora.weight_files import NotPlainlyStoredError
from tests.models import assert_same, hugging_face, snapshot

CPU = torch.device("cpu")


def saved(name: str, folder: Path, **options: Any) -> Any:
    model: Any = hugging_face(name)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "gpt_neox", "albert", "vit"])
def test_filled_is_what_from_pretrained_loads(tmp_path: Path, name: str) -> None:
    kind = type(saved(name, tmp_path))
    model = pretrained_on_meta(kind, str(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert missing_parameters(model) == []
    fill_parameters(model, CPU)
    expected = kind.from_pretrained(tmp_path)
    assert_same(snapshot(expected), snapshot(model))
    for (left, a), (right, b) in zip(expected.named_buffers(), model.named_buffers(), strict=True):
        assert left == right and torch.equal(a, b)
    assert model.training and model.config.to_dict() == expected.config.to_dict()


def test_several_files_and_another_dtype(tmp_path: Path) -> None:
    kind = type(saved("llama", tmp_path, max_shard_size="4KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = nn.ModuleDict({"net": pretrained_on_meta(kind, str(tmp_path), dtype=torch.bfloat16)})
    fill_parameters(model, CPU)
    assert_same(
        snapshot(kind.from_pretrained(tmp_path, dtype=torch.bfloat16)), snapshot(model["net"])
    )


def test_factors_and_new_heads_are_drawn_alike(tmp_path: Path) -> None:
    hugging_face("bert").base_model.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    filled = []
    for consumed in (0, 5):
        torch.manual_seed(7)
        torch.rand(consumed)
        model = pretrained_on_meta(AutoModelForSequenceClassification, str(tmp_path), num_labels=5)
        missing = missing_parameters(model)
        assert "classifier.weight" in missing and all("classifier" in n for n in missing)
        inject_lora(model, r=2, seed=3)
        fill_parameters(model, CPU)
        filled.append(model)
    assert_same(snapshot(filled[0]), snapshot(filled[1]))
    assert 0.01 < filled[0].classifier.weight.std() < 0.04, "BERT's own initialisation"
    loaded: Any = hugging_face("bert")
    inject_lora(loaded, r=2, seed=3)
    A = "bert.encoder.layer.0.attention.self.query.lora.A"
    assert torch.equal(filled[0].get_parameter(A), loaded.get_parameter(A))


def rename(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({f"x.{k}": v for k, v in load_file(file).items()}, file)


def remove(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (rename, NotPlainlyStoredError, "none of the model's parameters"),
        (remove, NotPlainlyStoredError, "holds no model.safetensors"),
        (reshape, ConfigError, "and the settings ask for"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Any, error: Any, message: str) -> None:
    kind = type(saved("bert", tmp_path))
    change(tmp_path)
    with pytest.raises(error, match=message):
        pretrained_on_meta(kind, str(tmp_path))


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    model = pretrained_on_meta(type(saved("bert", tmp_path)), str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="Every node needs the base model's files"):
        fill_parameters(model, CPU)
