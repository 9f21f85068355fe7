"""Further rounds of LoftQ, which quantize the base anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    inject_lora,
    load_adapter,
    load_adapter_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.metadata import base_fingerprint
from lightning_lora.quantization import dequantized, keep_trainable, quantized_layers
from tests.models import shake
from tests.modules import PlainClassifier, make_lora, make_trainer
from tests.quantized import any_bits, quantized_hugging_face, quantized_mlp

LOFTQ: dict[str, Any] = {"r": 4, "alpha": 10, "init": "loftq"}
IDS = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """Makes the same quantized model each time."""

    def make(kind: str = "nf4") -> Any:
        model = quantized_hugging_face("bert", kind, tmp_path / f"base-{kind}").eval()
        keep_trainable(model)
        return model

    make.folder = tmp_path / "base-nf4"  # type: ignore[attr-defined]
    return make


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: any_bits(layer.weight) for name, layer in quantized_layers(model).items()}


def errors(model: nn.Module, folder: Path) -> dict[str, float]:
    """How far base and update are from the original weight, by layer."""
    original = load_file(folder / "model.safetensors")
    return {
        name: (
            original[f"{name}.weight"] - dequantized(layer, torch.float32) - layer.delta_weight()
        )
        .norm()
        .item()
        for name, layer in quantized_layers(model).items()
        if hasattr(layer, "lora")
    }


def test_each_round_comes_nearer_to_the_original(base: Any) -> None:
    found = []
    for rounds in (1, 2, 6):
        model = base()
        before = bits(model)
        inject_lora(model, **LOFTQ, loftq_iter=rounds)
        assert all(torch.equal(before[n], b) for n, b in bits(model).items()) == (rounds == 1)
        found.append(errors(model, base.folder))
    means = [sum(each.values()) / len(each) for each in found]
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.97 * means[0]


def test_the_base_comes_back_as_the_same_objects(base: Any) -> None:
    model = base()
    before, expected, prints = bits(model), logits(model), set()
    objects = {name: layer.weight for name, layer in quantized_layers(model).items()}
    plan = inject_lora(model, **LOFTQ, loftq_iter=3)
    assert plan.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    prints.add(base_fingerprint(model))
    assert not torch.equal(logits(model), expected)
    remove_lora(model)
    assert all(torch.equal(before[name], b) for name, b in bits(model).items())
    assert all(layer.weight is objects[n] for n, layer in quantized_layers(model).items())
    assert torch.equal(logits(model), expected)
    inject_lora(model, r=2, alpha=6)
    prints.add(base_fingerprint(model))
    assert len(prints) == 1


def test_the_adapter_brings_its_base_along(base: Any, tmp_path: Path) -> None:
    model, other = base(), base()
    inject_lora(model, **LOFTQ, loftq_iter=3)
    shake(model)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    assert any(name.endswith("lora.A_prior") for name in state)
    inject_lora(other, LoRAConfig(**LOFTQ, loftq_iter=3), initialize=False)
    plain = bits(other)
    load_adapter_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))
    # A merge and its undoing are about the base that was made.
    made, expected = bits(other), logits(other)
    assert not all(torch.equal(plain[n], b) for n, b in made.items())
    merge_lora(other)
    torch.testing.assert_close(logits(other), expected, atol=1e-4, rtol=1e-3)
    unmerge_lora(other)
    assert torch.equal(logits(other), expected)
    with pytest.raises(CheckpointError, match="quantized the base anew for this adapter"):
        save_adapter(other, tmp_path / "adapter")
    remove_lora(other)
    assert all(torch.equal(plain[n], b) for n, b in bits(other).items())


def test_without_the_files_nothing_is_loaded(base: Any) -> None:
    model, other = base(), base()
    inject_lora(model, **LOFTQ, loftq_iter=2)
    inject_lora(other, LoRAConfig(**LOFTQ, loftq_iter=2), initialize=False)
    (base.folder / "model.safetensors").unlink()
    before, packed = adapter_state_dict(other), bits(other)
    with pytest.raises(CheckpointError, match="which are needed here too"):
        load_adapter_state_dict(other, adapter_state_dict(model))
    after = adapter_state_dict(other)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.equal(packed[n], b) for n, b in bits(other).items())
    # Where the base is the same already nothing has to be read.
    load_adapter_state_dict(model, adapter_state_dict(model))


class Wrapped(PlainClassifier):
    """A quantized model that is fed token numbers made of the inputs."""

    @classmethod
    def around(cls, net: nn.Module) -> Wrapped:
        model = cls()
        model.net = net
        return model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids=(x.abs() * 10).long().clamp(max=39)).logits
        return torch.cat([logits, -logits[:, :1]], dim=1)


def test_life_cycle(base: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**LOFTQ, "loftq_iter": 2}
    seed_everything(1)
    model = Wrapped.around(base())
    trainer = make_trainer(tmp_path, make_lora(**settings), max_epochs=2)
    trainer.checkpoint_callback.save_top_k = -1  # type: ignore[union-attr]
    trainer.fit(model)
    after = trainer.test(model, verbose=False)[0]["test_loss"]
    last = str(tmp_path / "last.ckpt")
    for again in (model, Wrapped.around(base())):
        tester = make_trainer(tmp_path / "other", make_lora(**settings))
        found = tester.test(again, ckpt_path=last, verbose=False)[0]["test_loss"]
        assert found == pytest.approx(after, abs=1e-5)
    resumed = Wrapped.around(base())
    trainer = make_trainer(tmp_path / "resumed", make_lora(**settings), max_epochs=2)
    trainer.fit(resumed, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.losses == model.losses[8:]
    load_adapter(fresh := base(), last)
    with torch.no_grad():
        expected = resumed.eval().net(input_ids=IDS).logits
    torch.testing.assert_close(logits(fresh), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(CheckpointError, match="loftq_iter: 2 in the checkpoint, 1 now"):
        make_trainer(tmp_path / "no", make_lora(**LOFTQ)).test(
            Wrapped.around(base()), ckpt_path=last
        )


def test_where_it_cannot_be(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"loftq_iter=2 quantizes weights anew, .* in 8 bits"):
        inject_lora(base("int8"), **LOFTQ, loftq_iter=2)
    with pytest.raises(ConfigError, match="no Hugging Face model"):
        inject_lora(quantized_mlp("nf4"), r=2, init="loftq", loftq_iter=2)
    with pytest.raises(ConfigError, match="about init='loftq', and init is 'kaiming'"):
        LoRAConfig(loftq_iter=2)
    with pytest.raises(ConfigError, match="loftq_iter must be a whole number"):
        LoRAConfig(init="loftq", loftq_iter=0)


def test_no_other_adapter_shares_the_base(base: Any) -> None:
    model = base()
    inject_lora(model, **LOFTQ, loftq_iter=2)
    with pytest.raises(ConfigError, match="quantized the base anew for the adapter"):
        add_adapter(model, "other", r=2)
    with pytest.raises(ConfigError, match="several adapters share one base"):
        add_adapter(base(), "first", **LOFTQ, loftq_iter=2)
