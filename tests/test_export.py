from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from lightning_lora import inject_lora, load_adapter
from lightning_lora.errors import ConfigError
from lightning_lora.export import announce_export
from tests.models import hugging_face
from tests.modules import PlainClassifier, make_lora, make_trainer
from tests.test_interop import SIZES

IDS = torch.arange(2, 22).reshape(2, 10)


class Wrapped(PlainClassifier):
    """A Hugging Face model in a LightningModule that feeds it token ids made of the inputs."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.net = model
        if head is not None:
            self.head = head

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 10).long().clamp(max=63)
        out = self.net(input_ids=ids)
        if hasattr(self, "head"):
            return self.head(out.pooler_output)
        logits: Tensor = out.logits
        return logits if logits.ndim == 2 else logits[:, -1, :3]


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def tied_llama() -> Any:
    return Llama(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))


@pytest.mark.parametrize("make", [bert, tied_llama])
def test_export_of_a_hugging_face_model(tmp_path: Path, make: Any) -> None:
    model = make()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    targets: Any = ["q_proj", "lm_head"] if make is tied_llama else "all-linear"
    lora = make_lora(export_dir=str(tmp_path / "out"), target_modules=targets)
    module = Wrapped(model)
    make_trainer(tmp_path, lora, max_epochs=1).fit(module)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        merged = type(model).from_pretrained(tmp_path / "out/merged").eval()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
        bare = make()
        bare.load_state_dict(base)
        assert not torch.allclose(bare.eval()(input_ids=IDS).logits, expected, atol=1e-3)
        load_adapter(bare, tmp_path / "out/adapter")
        torch.testing.assert_close(
            bare.eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4
        )
    assert set(merged.state_dict()) == set(base)


def test_a_head_beside_the_hugging_face_model_is_exported_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    head = nn.Linear(SIZES["hidden_size"], 3)
    module = Wrapped(BertModel(BertConfig(**SIZES)), head)
    lora = make_lora(export_dir=str(tmp_path / "out"), modules_to_save=["head"])
    make_trainer(tmp_path, lora, max_epochs=1).fit(module)
    merged = load_file(tmp_path / "out/merged/model.safetensors")
    assert torch.equal(merged["head.weight"], head.weight)
    assert not any("lora" in key for key in merged)


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_fit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # an earlier export is replaced
        make_trainer(tmp_path, make_lora(export_dir=str(out)), max_epochs=1).fit(PlainClassifier())
    (out / "merged" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"merged holds what no export has written \(keep.txt\)"):
        make_trainer(tmp_path, make_lora(export_dir=str(out))).fit(PlainClassifier())
    assert (out / "merged" / "keep.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"keep.txt is a file. Choose another folder"):
        make_trainer(tmp_path, make_lora(export_dir=str(out / "merged" / "keep.txt"))).fit(
            PlainClassifier()
        )


@pytest.mark.parametrize(("name", "said"), [("mixtral", True), ("llama", False)])
def test_what_a_sharded_export_will_need_is_said_before_the_fit(
    name: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("lightning_lora.export.rank_zero_info", messages.append)
    module = Wrapped(hugging_face(name))
    inject_lora(module, r=2)
    announce_export(module, SimpleNamespace(is_sharded=True), tmp_path)  # type: ignore[arg-type]
    assert [("join or split its parameters" in message) for message in messages] == [True] * said
    announce_export(module, SimpleNamespace(is_sharded=False), tmp_path)  # type: ignore[arg-type]
    assert len(messages) == said
