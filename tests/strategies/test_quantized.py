"""A 4-bit base under FSDP2, on two processes, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lora import LoRACallback
from lightning_lora.errors import ConfigError
from lightning_lora.quantization import store_as
from tests.commands import run_module
from tests.quantized import any_bits, quantized_mlp
from tests.strategies.quantized import Packed
from tests.strategies.scenarios import SAVE_AT, STEPS, Scenario


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("quantized")
    for processes, names in (
        (1, ["one", "one-merged", "dora-one"]),
        (2, ["two", "two-from-one", "two-bf16-true", "two-merged"]),
        (2, ["dora-two", "dora-two-bf16-true"]),
        (1, ["one-from-two"]),
    ):
        done = run_module("tests.strategies.quantized", [str(root), names], processes, 300)
        assert done.returncode == 0, done.stderr[-4000:]
    found = {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/result.json")}
    return {"root": root, **found}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two-from-one", "one-from-two"])
def test_same_numbers_and_resume_either_way(results: dict[str, Any], name: str) -> None:
    expected, found = results["one"], results[name]
    count = len(found["losses"])
    assert count == (STEPS - SAVE_AT if "from" in name else STEPS)
    assert found["losses"] == pytest.approx(expected["losses"][-count:], abs=2e-6)
    assert found["losses"][-1] != found["losses"][0]
    assert found["fingerprint"] == expected["fingerprint"]
    # Packed weights, their biases and the factors are shards; the root stays gathered at last.
    assert found["sharded"] == (0 if name.startswith("one") else 4 + 4 + 2 * 4)


@pytest.mark.slow
def test_packed_weights_take_the_dtype_that_units_are_gathered_in(results: dict[str, Any]) -> None:
    assert results["two-bf16-true"]["dtypes"] == ["torch.bfloat16"]
    assert results["two"]["dtypes"] == ["torch.float32"]
    assert results["two-bf16-true"]["losses"] == pytest.approx(results["one"]["losses"], abs=0.05)


@pytest.mark.slow
def test_magnitudes_train_on_packed_weights(results: dict[str, Any]) -> None:
    expected = results["dora-one"]["losses"]
    assert results["dora-two"]["losses"] == pytest.approx(expected, abs=2e-6)
    assert results["dora-two-bf16-true"]["losses"] == pytest.approx(expected, abs=0.05)
    assert expected[-1] != pytest.approx(results["one"]["losses"][-1], abs=1e-4)
    assert results["dora-two"]["sharded"] == 4 + 4 + 3 * 4


@pytest.mark.slow
def test_files_hold_the_adapter_alone(results: dict[str, Any]) -> None:
    one, two = (
        torch.load(results["root"] / name / f"step={SAVE_AT}.ckpt", weights_only=True)
        for name in ("one", "two")
    )
    assert list(one["state_dict"]) == list(two["state_dict"])
    assert all(".lora." in name for name in two["state_dict"])
    for key in ("fingerprint", "parameters", "quantization"):
        assert two["lightning_lora"]["base"][key] == one["lightning_lora"]["base"][key]


@pytest.mark.slow
def test_a_merge_into_packed_shards_and_the_base_again(results: dict[str, Any]) -> None:
    one, two = (
        torch.load(results["root"] / name / "merged.pt", weights_only=True)
        for name in ("one-merged", "two-merged")
    )
    assert results["two-merged"]["base"] == results["one"]["base"]
    for name, weight in one["merged"].items():
        # Factors that differ by 1e-7 may round to the next of the 16 levels, and rarely do.
        assert ((two["merged"][name] - weight).abs() > 1e-5).float().mean() < 0.01
        assert weight.double().sum().item() != results["one"]["base"][name]
        assert two["errors"][name] == pytest.approx(one["errors"][name], rel=0.05)


def test_storage_is_a_matter_of_view() -> None:
    model = quantized_mlp("nf4")
    x, packed = torch.randn(3, 64), any_bits(model.fc1.weight)
    before = model(x)
    store_as(model, torch.float32)
    assert model.fc1.weight.dtype == torch.float32
    assert torch.equal(any_bits(model.fc1.weight), packed)
    assert torch.equal(model(x), before)
    store_as(model, torch.uint8)
    assert torch.equal(model(x), before)
    with pytest.raises(ConfigError, match="int8"):
        store_as(quantized_mlp("int8"), torch.float32)


def sharding_trainer(root: Path, lora: LoRACallback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        strategy="fsdp2",
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=1,
        default_root_dir=root,
    )


def test_a_merge_that_cannot_be_is_refused_before_the_fit(tmp_path: Path) -> None:
    lora = LoRACallback(r=4, alpha=12, target_modules=["up"], verbose=False)
    with pytest.raises(ConfigError, match="merge_on_fit_end=False"):
        sharding_trainer(tmp_path, lora).fit(Packed(Scenario("x")))


def test_an_export_of_packed_shards_is_refused_before_the_fit(tmp_path: Path) -> None:
    settings = {"merge_base": "requantized", "export_dir": str(tmp_path / "x")}
    lora = LoRACallback(r=4, alpha=12, target_modules=["up"], verbose=False, **settings)
    with pytest.raises(ConfigError, match="lightning-lora merge"):
        sharding_trainer(tmp_path, lora).fit(Packed(Scenario("x")))


def test_an_8_bit_optimizer_on_shards(tmp_path: Path) -> None:
    import bitsandbytes

    class Eight(Packed):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.parameters() if p.requires_grad]
            return bitsandbytes.optim.AdamW8bit(trained, lr=0.01)

    lora = LoRACallback(r=4, alpha=12, target_modules=["up"], verbose=False, merge_on_fit_end=False)
    with pytest.raises(ConfigError, match=r"AdamW8bit .* parameters that are shards"):
        sharding_trainer(tmp_path, lora).fit(Eight(Scenario("x")))
