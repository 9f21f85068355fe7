"""A recipe's base in 4 or 8 bits, from the settings to the exported folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRACallback, load_lightning_module
from lightning_lora.errors import ConfigError
from lightning_lora.quantization import quantization_name, quantized_layers
from lightning_lora.recipes.classification.data import ClassificationDataModule
from lightning_lora.recipes.classification.module import TextClassifier
from lightning_lora.recipes.quantization import QuantizationOptions


def fit(
    model: Path, data: Path, root: Path, lora: dict[str, Any] | None = None, **settings: Any
) -> tuple[TextClassifier, Trainer, LoRACallback]:
    trainer_settings = {"precision": "32-true", "max_epochs": 2, **settings.pop("trainer", {})}
    ckpt_path = settings.pop("ckpt_path", None)
    seed_everything(0, verbose=False)
    module = TextClassifier(str(model), **{"quantization": "nf4", **settings})
    callback = LoRACallback(**{"r": 4, "alpha": 16, "verbose": False, **(lora or {})})
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, ModelCheckpoint(root, save_last=True)],
        **trainer_settings,
    )
    files = {f"{split}_file": str(data / f"{split}.csv") for split in ("train", "validation")}
    trainer.fit(
        module, datamodule=ClassificationDataModule(**files, batch_size=8), ckpt_path=ckpt_path
    )
    return module, trainer, callback


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("nf4", None, "nf4 double"),
        ("fp4", {"double": False}, "fp4"),
        ("int8", None, "int8"),
    ],
)
def test_training_a_quantized_base(
    kind: str,
    options: Any,
    name: str,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses: list[float] = []
    log = TextClassifier.log_training

    def record(self: TextClassifier, loss: torch.Tensor, count: int) -> None:
        losses.append(float(loss))
        log(self, loss, count)

    monkeypatch.setattr(TextClassifier, "log_training", record)
    module, _, lora = fit(
        tiny_model,
        tiny_data,
        tmp_path,
        {"r": 8, "alpha": 16, "export_dir": str(tmp_path / "x")},
        quantization=kind,
        quantization_options=options,
        learning_rate=3e-3,
        trainer={"max_epochs": 10},
    )
    assert sum(losses[-6:]) < 0.75 * sum(losses[:6])
    written = json.loads((tmp_path / "x" / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    assert type(module.model.classifier) is nn.Linear
    assert lora.merge_report is not None and lora.merge_report.errors
    again = load_lightning_module(TextClassifier, tmp_path / "last.ckpt", merge=False)
    layers = quantized_layers(again)
    assert {quantization_name(layer) for layer in layers.values()} == {name}
    assert not any("classifier" in layer for layer in layers)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)],
)
def test_dtypes_follow_the_precision(
    precision: str, dtype: torch.dtype, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    lora = {"merge_on_fit_end": False, "train_layer_norms": True}
    trainer = {"precision": precision, "max_steps": 2, "max_epochs": -1}
    module, _, _ = fit(tiny_model, tiny_data, tmp_path, lora, trainer=trainer)
    query: Any = module.model.bert.encoder.layer[0].attention.self.query
    assert query.compute_dtype == dtype
    # No float32 copy of what is not trained.
    assert module.model.bert.embeddings.word_embeddings.weight.dtype == dtype
    assert query.lora.A.dtype == torch.float32
    masters = dtype if precision == "bf16-true" else torch.float32
    assert module.model.classifier.weight.dtype == masters
    assert module.model.classifier.weight.requires_grad
    assert module.model.bert.embeddings.LayerNorm.weight.dtype == masters
    assert module.hparams["dtype"] == str(dtype).removeprefix("torch.")


def test_a_float32_base_that_is_asked_for(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    trainer = {"precision": "bf16-mixed", "max_steps": 1, "max_epochs": -1}
    module, _, _ = fit(tiny_model, tiny_data, tmp_path, dtype="float32", trainer=trainer)
    assert module.model.bert.embeddings.word_embeddings.weight.dtype == torch.float32


def test_what_trains_whole_is_left_out_of_the_quantization(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    lora = {"modules_to_save": ["pooler", "classifier"], "merge_on_fit_end": False}
    options = {"skip_modules": ["layer.1.output.dense"]}
    trainer = {"max_steps": 1, "max_epochs": -1}
    module, _, _ = fit(
        tiny_model, tiny_data, tmp_path, lora, quantization_options=options, trainer=trainer
    )
    assert type(module.model.bert.pooler.dense) is nn.Linear
    assert module.model.bert.pooler.dense.weight.requires_grad
    names = list(quantized_layers(module.model))
    assert len(names) == 11 and "bert.encoder.layer.1.output.dense" not in names


@pytest.mark.parametrize(
    ("skipped", "message"),
    [("layer.1.outptu.dense", "matches no module.*output.dense"), ("(", "no regular expression")],
)
def test_modules_to_leave_as_they_are_must_be_there(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, skipped: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tiny_model, tiny_data, tmp_path, quantization_options={"skip_modules": [skipped]})


def test_gradient_checkpointing_changes_nothing(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    found = []
    for checkpointing in (False, True):
        module, _, _ = fit(
            tiny_model,
            tiny_data,
            tmp_path / str(checkpointing),
            {"merge_on_fit_end": False},
            gradient_checkpointing=checkpointing,
            trainer={"max_steps": 3, "max_epochs": -1},
        )
        found.append({n: p for n, p in module.named_parameters() if p.requires_grad})
        assert module.model.is_gradient_checkpointing is checkpointing
    for name, parameter in found[0].items():
        assert torch.equal(parameter, found[1][name]), name
    assert any("layer.0" in n and n.endswith("lora.B") and p.any() for n, p in found[0].items())


def test_a_resumed_run_is_the_uninterrupted_one_with_an_8_bit_optimizer(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    import bitsandbytes

    # 64 x 48 and 64 x 32 elements, half of them and more above the limit below.
    lora = {"r": 64, "alpha": 16, "dropout": 0.1, "merge_on_fit_end": False}
    optimizer = lambda groups: bitsandbytes.optim.AdamW8bit(  # noqa: E731
        groups, lr=1e-3, min_8bit_size=2048
    )
    found = []
    for epochs, path in ((3, None), (1, None), (3, tmp_path / "1" / "last.ckpt")):
        module, trainer, _ = fit(
            tiny_model,
            tiny_data,
            tmp_path / str(epochs),
            lora,
            optimizer=optimizer,
            schedule="constant",
            warmup=0,
            trainer={"max_epochs": epochs},
            ckpt_path=path,
        )
        states = trainer.optimizers[0].state
        kinds = {p.numel() >= 2048: v["state1"].dtype for p, v in states.items()}
        # Small states stay in 32 bits, which is bitsandbytes' own rule.
        assert kinds == {True: torch.uint8, False: torch.float32}
        found.append((dict(module.named_parameters()), list(states.values())))
    (whole, states), _, (resumed, resumed_states) = found
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name
    for one, other in zip(states, resumed_states, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, key


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nf3", None, "did you mean|nf4, fp4, int8"),
        (None, {"double": True}, "without model.quantization"),
        ("nf4", {"duoble": True}, "no 'duoble'.*double"),
        ("nf4", {"compute_dtype": "int8"}, "float32, bfloat16 or float16"),
        ("nf4", {"skip_modules": "head"}, "list of names"),
        ("nf4", {"double": "no"}, "double must be true or false, got 'no'"),
        ("int8", {"threshold": "six"}, "threshold must be a number of at least 0, got 'six'"),
        ("int8", {"threshold": -1, "double": 3}, "threshold must .*; .*double must be true"),
    ],
)
def test_settings_that_cannot_be(kind: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationOptions.read(kind, options)
    with pytest.raises(ConfigError):
        TextClassifier("x", quantization=kind, quantization_options=options)


def test_merging_into_the_original_weights(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    trainer = {"max_steps": 2, "max_epochs": -1}
    _, _, lora = fit(
        base,
        tiny_data,
        tmp_path,
        {"merge_base": "original", "export_dir": str(tmp_path / "x")},
        trainer=trainer,
    )
    assert lora.merge_report is not None and lora.merge_report.base == "original"
    merged = load_file(tmp_path / "x" / "merged" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    change = (merged[f"bert.{name}"] - original[name]).norm() / original[name].norm()
    # The update of two steps, and nothing of the error of the quantization (about 0.09).
    assert 0 < change < 0.02 < max(lora.merge_report.errors.values())


def test_original_weights_that_are_gone_are_missed_before_the_fit(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    build = TextClassifier.build_model

    def build_and_lose(self: TextClassifier) -> Any:
        model = build(self)
        (base / "model.safetensors").unlink()
        return model

    monkeypatch.setattr(TextClassifier, "build_model", build_and_lose)
    monkeypatch.setattr(
        TextClassifier, "training_step", lambda *args: pytest.fail("it was trained")
    )
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        fit(base, tiny_data, tmp_path, {"merge_base": "original"})
