"""Adapters of PEFT's that began by PiSSA or OLoRA, without a model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import inject_lora, load_adapter
from lightning_lora.adapters import notes_of, read_adapter
from lightning_lora.conversion import prepare_conversion, write_conversion
from lightning_lora.errors import CheckpointError
from lightning_lora.offline_merging import merge_on_disk
from lightning_lora.starting import starting_state
from tests.models import hugging_face
from tests.test_interop import train_a_little
from tests.test_peft_ties import logits

peft = pytest.importorskip(
    "peft", reason="PEFT is a peer to compare with, installed by the test extra"
)


@pytest.mark.parametrize(
    ("name", "targets", "init"),
    [
        ("llama", ["q_proj", "up_proj"], "pissa"),
        ("llama", ["q_proj", "up_proj"], "olora"),
        ("gpt2", ["c_attn"], "pissa"),
    ],
)
def test_the_start_is_found_in_the_files_of_the_base(
    tmp_path: Path, name: str, targets: list[str], init: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    hugging_face(name).save_pretrained(base)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=init)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    train_a_little(theirs)
    theirs.save_pretrained(adapter)
    expected = logits(theirs)
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=1e-2
    )

    merge_on_disk(adapter, tmp_path / "merged", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)

    write_conversion(prepare_conversion(adapter, base), tmp_path / "again.ckpt")
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(nn.ModuleDict({"model": model}), tmp_path / "again.ckpt")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)

    module = nn.ModuleDict({"model": AutoModelForCausalLM.from_pretrained(base)})
    inject_lora(module, r=2, alpha=6, target_modules=targets, init=init)
    with pytest.raises(CheckpointError, match="PEFT does not save that start"):
        starting_state(module, adapter)
    assert starting_state(module, tmp_path / "again.ckpt")

    (note,) = notes_of(read_adapter(adapter))
    assert "together with the start" in note and not notes_of(read_adapter(tmp_path / "again.ckpt"))
