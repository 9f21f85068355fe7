"""The tokenizer of a fit beside what is written from its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lightning_lora.offline_export import prepare_export, write_export
from lightning_lora.offline_merging import merge_on_disk
from lightning_lora.tokenizer_files import tokenizer_files, tokenizer_settings
from tests.models import hugging_face
from tests.modules import make_lora, make_trainer
from tests.recipes.causal_lm.material import make_tokenizer
from tests.test_export import Wrapped

TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def settled(tokenizer: Any) -> Any:
    """As a recipe makes it."""
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 77
    return tokenizer


def around(model: Any) -> Any:
    """A LightningModule around a model, whose checkpoints can be read."""
    module = Wrapped(model)
    for name in ("model", "head"):
        module.hparams.pop(name)
    return module


def assert_settled(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 77
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "a;b;"


def test_merges_and_exports_have_what_the_fit_gave_its_tokenizer(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = hugging_face("llama")
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model.config._name_or_path = str(base)
    module = around(model)
    module.tokenizer = settled(make_tokenizer())
    lora = make_lora(export_dir=str(tmp_path / "out"))
    make_trainer(tmp_path, lora, max_epochs=1).fit(module)
    path = tmp_path / "last.ckpt"
    stored = torch.load(path, weights_only=True)["lightning_lora"]["tokenizer"]
    assert stored == {
        "chat_template": TEMPLATE,
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
    }
    merge_on_disk(path, tmp_path / "merged")
    write_export(prepare_export(path), tmp_path / "exported")
    for folder in (tmp_path / "out/merged", tmp_path / "merged", tmp_path / "exported"):
        assert_settled(folder)
    for name in ("chat_template.jinja", "tokenizer.json"):
        mine, fits = (tmp_path / "merged" / name, tmp_path / "out/merged" / name)
        assert mine.read_bytes() == fits.read_bytes(), name


def test_files_that_say_the_same_are_those_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tokenizer = settled(make_tokenizer())
    tokenizer.save_pretrained(base)
    for settings in (tokenizer_settings(tokenizer), None):
        with tokenizer_files(base, {"tokenizer": settings}) as files:
            assert files and all(file.parent == base for file in files)
    # A base without a tokenizer gets none.
    shutil.rmtree(base)
    base.mkdir()
    with tokenizer_files(base, {"tokenizer": {"pad_token": "x"}}) as files:
        assert files == []


def test_modules_without_a_tokenizer(tmp_path: Path) -> None:
    module = around(hugging_face("llama"))
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(module)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_lora"]["tokenizer"]
    assert stored is None and tokenizer_settings(object()) is None
