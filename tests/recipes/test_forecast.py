"""A recipe's memory, counted from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.recipes import (
    CausalLM,
    CausalLMDataModule,
    ClassificationDataModule,
    QuestionAnswerer,
    QuestionAnsweringDataModule,
    TextClassifier,
)
from lightning_lora.recipes import forecast as forecasting
from lightning_lora.recipes.blueprint import BatchShape, build_empty, largest_batch
from lightning_lora.recipes.forecast import Forecast, Precision, make_forecast

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
RECIPES: dict[str, tuple[Any, Any, str]] = {
    "classification": (TextClassifier, ClassificationDataModule, "bert"),
    "questions": (QuestionAnswerer, QuestionAnsweringDataModule, "roberta"),
    "texts": (CausalLM, CausalLMDataModule, "llama"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Makes a folder with a config.json alone."""

    def make(architecture: str, **settings: Any) -> str:
        import transformers

        config = transformers.AutoConfig.for_model(architecture, **{**SMALL, **settings})
        config.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
        return str(tmp_path)

    return make


def _forecast(
    module: Any,
    data: Any,
    precision: str = "32-true",
    ranks: tuple[int, ...] = (1, 4),
    device: str = "cuda",
    frozen_dtype: str | None = None,
) -> Forecast:
    config = LoRAConfig(r=2, alpha=4)
    return make_forecast(
        module, data, config, frozen_dtype, Precision.of(precision), False, device, ranks
    )


def _row(found: Forecast, method: str, strategy: str = "ddp", ranks: int = 1) -> Any:
    return next(
        row.memory
        for row in found.rows
        if (row.method, row.strategy, row.ranks) == (method, strategy, ranks)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_metered_from_its_config_alone(
    recipe: str, precision: str, checkpointing: bool, folder: Any
) -> None:
    module_class, data_class, architecture = RECIPES[recipe]
    module = module_class(folder(architecture), gradient_checkpointing=checkpointing)
    data = data_class(train_file="missing.csv", batch_size=3, max_length=16)
    found = _forecast(module, data, precision)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any("formula" in note for note in found.notes)
    assert found.batch == BatchShape(3, 16)
    full, lora, qlora = (_row(found, method) for method in ("full", "lora", "qlora"))
    assert full.total > lora.total > qlora.total
    assert full.activations > 0
    trained, total = found.parameters["lora"]
    assert trained == found.plan.trainable_parameters < total
    assert (
        found.parameters["full"][0]
        == found.parameters["full"][1]
        == total - (found.plan.lora_parameters)
    )
    for method in ("full", "lora", "qlora"):
        sharded = _row(found, method, "fsdp", 4)
        assert sharded.weights < _row(found, method, "ddp", 4).weights
        assert sharded.communication > 0


def test_checkpointing_packing_and_batches_count(folder: Any) -> None:
    path = folder("llama")
    held = {}
    for name, checkpointing, rows, packing in (
        ("plain", False, 2, False),
        ("checkpointing", True, 2, False),
        ("more", False, 4, False),
        ("packed", False, 2, True),
    ):
        module = CausalLM(path, gradient_checkpointing=checkpointing)
        data = CausalLMDataModule(
            train_file="x.csv", batch_size=rows, max_length=16, packing=packing
        )
        held[name] = _row(_forecast(module, data), "lora").activations
    assert held["checkpointing"] < held["plain"] < held["more"]
    assert held["more"] == pytest.approx(2 * held["plain"], rel=0.05)
    assert held["packed"] == pytest.approx(held["plain"], rel=0.05)


def test_a_batch_is_no_longer_than_the_model_takes(folder: Any) -> None:
    module = QuestionAnswerer(folder("roberta"))
    build_empty(module)
    data = QuestionAnsweringDataModule(train_file="x.json", max_length=384, doc_stride=1)
    assert largest_batch(module, data).tokens == 32 - 2


def test_unknown_classes_are_assumed_and_said(folder: Any) -> None:
    path = folder("bert")
    data = ClassificationDataModule(train_file="missing.csv")
    module = TextClassifier(path)
    assert "2 are assumed" in _forecast(module, data, ranks=(1,)).notes[0]
    module = TextClassifier(path, class_names=["a", "b", "c"])
    assert _forecast(module, data, ranks=(1,)).notes == ()
    assert module.model.classifier.out_features == 3


def test_precision_settles_how_states_are_stored(folder: Any) -> None:
    path = folder("llama")
    data = CausalLMDataModule(train_file="x.csv", batch_size=2, max_length=16)
    full = {
        precision: _row(_forecast(CausalLM(path), data, precision, ranks=(1,)), "full")
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }
    assert full["bf16-true"].gradients == full["32-true"].gradients / 2
    assert full["bf16-true"].optimizer == full["32-true"].optimizer / 2
    assert full["bf16-mixed"].gradients == full["32-true"].gradients
    lora = _row(_forecast(CausalLM(path), data, "bf16-true", ranks=(1,)), "lora")
    single = _row(_forecast(CausalLM(path), data, "32-true", ranks=(1,)), "lora")
    assert lora.gradients == single.gradients, "factors stay in float32"
    frozen = _forecast(CausalLM(path), data, "bf16-mixed", ranks=(1,), frozen_dtype="bf16")
    assert _row(frozen, "lora").weights < single.weights
    assert _row(frozen, "full").weights == full["bf16-mixed"].weights


def test_the_optimizer_of_the_recipe_counts(folder: Any) -> None:
    path = folder("llama")
    data = CausalLMDataModule(train_file="x.csv", batch_size=2, max_length=16)
    module = CausalLM(path, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    found = _forecast(module, data, ranks=(1,))
    assert found.optimizer.name == "SGD"
    assert _row(found, "full").optimizer == 0


def test_what_cannot_be_metered_is_estimated(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("llama")
    data = CausalLMDataModule(train_file="x.csv", batch_size=2, max_length=16)
    metered = _forecast(CausalLM(path), data, "bf16-true", ranks=(1,))
    monkeypatch.setattr(forecasting, "meter", lambda *_: None)
    found = _forecast(CausalLM(path), data, "bf16-true", ranks=(1,))
    assert [note for note in found.notes if "formula" in note] == list(found.notes)
    logits = 2 * 16 * 40
    assert _row(found, "full").activations == 2 * (34 * 2 * 16 * 16) + 2 * logits
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(_row(found, "full"), part) == getattr(_row(metered, "full"), part)


def test_a_model_that_looks_at_values_is_not_metered(folder: Any) -> None:
    """Its RoPE grows with the longest position, which a tensor without values has not."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    module = CausalLM(folder("llama", rope_parameters=rope))
    data = CausalLMDataModule(train_file="x.csv", batch_size=2, max_length=16)
    assert any("formula" in note for note in _forecast(module, data, ranks=(1,)).notes)


def test_kernels_of_the_device_count(folder: Any) -> None:
    """Dropout keeps four bytes an element on a CPU, and attention with dropout its matrix."""
    path = folder("bert")
    data = ClassificationDataModule(train_file="missing.csv", batch_size=3, max_length=16)
    cuda, cpu = (
        _row(_forecast(TextClassifier(path), data, ranks=(1,), device=device), "full")
        for device in ("cuda", "cpu")
    )
    assert cuda.activations < cpu.activations
    assert (cuda.weights, cuda.optimizer) == (cpu.weights, cpu.optimizer)


def test_unknown_precisions_are_refused() -> None:
    assert Precision.of(16).mixed is torch.float16
    with pytest.raises(ConfigError, match="transformer-engine, only 32-true"):
        Precision.of("transformer-engine")


def test_data_modules_without_sizes_are_refused(folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size and data\.max_length"):
        _forecast(CausalLM(folder("llama")), object())
