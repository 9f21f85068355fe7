"""What a Trainer must and must not have, said before or while it goes wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from torch import Tensor

from lightning_lora import LoRACallback
from lightning_lora.errors import CheckpointError, ConfigError
from tests.modules import PlainClassifier, make_lora, make_trainer


def test_callbacks_that_unfreeze_are_refused(tmp_path: Path) -> None:
    class WithBackbone(PlainClassifier):
        @property
        def backbone(self) -> Any:
            return self.net

    trainer = make_trainer(tmp_path, make_lora(), callbacks=[BackboneFinetuning()])
    with pytest.raises(ConfigError, match="BackboneFinetuning unfreezes layers during the fit"):
        trainer.fit(WithBackbone())


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end"])
def test_a_base_that_is_unfrozen_during_the_fit_is_noticed(tmp_path: Path, hook: str) -> None:
    def unfreeze(self: Any, *_: Any) -> None:
        if self.current_epoch == 1:
            self.net.requires_grad_(True)

    module = type("Unfreezing", (PlainClassifier,), {hook: unfreeze})()
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    trainer = make_trainer(tmp_path, make_lora(), max_epochs=3)
    with pytest.raises(ConfigError, match=r"6 parameters .* were unfrozen.* net\.0\.weight"):
        trainer.fit(module)
    assert trainer.current_epoch == 1
    if hook == "on_train_epoch_start":
        now = dict(module.net.named_parameters())
        assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_dropout_that_has_no_effect_is_said(tmp_path: Path) -> None:
    module = PlainClassifier()
    module.net.eval()
    with pytest.warns(UserWarning, match=r"dropout=0.5 has no effect.*Call \.train\(\)"):
        make_trainer(tmp_path, make_lora(dropout=0.5), max_epochs=1).fit(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no effect")
        make_trainer(tmp_path, make_lora(dropout=0.5), max_epochs=1).fit(PlainClassifier())


class WithIdleLayers(PlainClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.never_called = torch.nn.Linear(4, 4)


def test_layers_that_learn_nothing_are_named(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="1 adapted layers have learned nothing so far: never_call"
    ):
        make_trainer(tmp_path, make_lora(), max_epochs=1).fit(WithIdleLayers())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learned nothing")
        make_trainer(tmp_path, make_lora(), max_epochs=1).fit(PlainClassifier())
        lora = make_lora(exclude_modules=["never_called"])
        make_trainer(tmp_path, lora, max_epochs=1).fit(WithIdleLayers())


def test_a_best_checkpoint_that_is_never_kept_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[
            make_lora(merge_from="best"),
            ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=0),
        ],
    )
    with pytest.raises(ConfigError, match="'val_loss' has save_top_k=0"):
        trainer.fit(PlainClassifier())


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": 0}])
def test_a_fit_that_keeps_nothing_merges_what_it_has(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    lora = make_lora(merge_from="best", export_dir=str(tmp_path / "export"))
    with pytest.warns(UserWarning, match="the weights as they are were merged"):
        make_trainer(tmp_path, lora, **options).fit(PlainClassifier())
    assert (tmp_path / "export" / "merged").is_dir()


class WithPath(PlainClassifier):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_a_checkpoint_could_not_be_read_with(tmp_path: Path) -> None:
    module = WithPath(tmp_path)
    with pytest.raises(ConfigError, match=r"folder \(PosixPath\).*ignore=\['folder'\]"):
        make_trainer(tmp_path, make_lora(merge_from="best")).fit(module)
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(module)
    with pytest.raises(CheckpointError, match=r"save_hyperparameters.*pathlib\.PosixPath") as info:
        make_trainer(tmp_path, make_lora()).fit(
            WithPath(tmp_path), ckpt_path=tmp_path / "last.ckpt"
        )
    assert "\x1b" not in str(info.value) and "add_safe_globals" not in str(info.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"merge_base": "orig"}, "merge_base must be one of .*did you mean"),
        ({"frozen_dtype": "float16"}, "frozen_dtype must be one of 'bf16', 'fp16'"),
        ({"init_batches": "3"}, "init_batches must be a whole number of at least 1, got '3'"),
        ({"exact_resume": "false"}, "exact_resume must be true or false, got 'false'"),
        ({"merge_on_fit_end": "no"}, "merge_on_fit_end must be true or false"),
        ({"init_from": 3}, "init_from must be a path or null, got 3"),
        ({"export_dir": ""}, "export_dir must be a path or null"),
    ],
)
def test_settings_of_the_callback_alone(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LoRACallback(**settings)
    with pytest.raises(ConfigError, match="2 problems in the LoRA settings:\n  - r must"):
        LoRACallback(r=-2, **settings)


class Renaming(PlainClassifier):
    """Its checkpoints have names of their own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"x.{name}": value for name, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("x."): v for name, v in state.items()}


def test_a_module_may_rename_what_its_checkpoints_hold(tmp_path: Path) -> None:
    module = Renaming()
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(module)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("x.net.") for name in state)
    resumed = Renaming()
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name])
    with pytest.raises(CheckpointError, match=r"missing: net\.0\.lora\.A"):
        make_trainer(tmp_path, make_lora()).fit(
            type("Other", (PlainClassifier,), {"on_load_checkpoint": lambda self, _: None})(),
            ckpt_path=tmp_path / "last.ckpt",
        )


def test_a_module_may_configure_the_callback(tmp_path: Path) -> None:
    class Configuring(PlainClassifier):
        def configure_callbacks(self) -> list[Callback]:
            return [make_lora()]

    module = Configuring()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module)
    merged = {name: value.clone() for name, value in module.net.state_dict().items()}
    (first,) = trainer.validate(module)
    (second,) = trainer.validate(module, ckpt_path=tmp_path / "last.ckpt")
    assert first["val_loss"] == pytest.approx(second["val_loss"])
    assert merged.keys() == module.net.state_dict().keys()
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, merged[name])


def test_settings_count_on_a_model_that_was_adapted_before(tmp_path: Path) -> None:
    source = PlainClassifier()
    make_trainer(tmp_path / "first", make_lora(), max_epochs=1).fit(source)
    path = str(tmp_path / "first" / "last.ckpt")
    module = PlainClassifier()
    make_trainer(tmp_path, make_lora()).validate(module)
    lora = make_lora(init_from=path, frozen_dtype="bf16", merge_on_fit_end=False)
    trainer = make_trainer(tmp_path, lora, precision="bf16-mixed", max_epochs=1, callbacks=[])
    started: dict[str, torch.Tensor] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            started["B"] = pl_module.net[0].lora.B.detach().clone()

    trainer.callbacks.append(Look())  # type: ignore[attr-defined]
    trainer.fit(module)
    expected = torch.load(path, weights_only=True)["state_dict"]["net.0.lora.B"]
    assert expected.any() and torch.equal(started["B"], expected)
    assert module.net[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]


def test_double_precision_is_kept(tmp_path: Path) -> None:
    module = PlainClassifier()
    make_trainer(tmp_path, make_lora(), precision="64-true", max_epochs=1).fit(module)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.dtype == torch.float64 for value in state.values())
    again = PlainClassifier()
    trainer = make_trainer(tmp_path, make_lora(merge_on_fit_end=False), precision="64-true")
    trainer.validate(again, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(again.net[0].lora.B, state["net.0.lora.B"])  # type: ignore[index, union-attr]


class FrozenBackbone(PlainClassifier):
    """Runs all but the last layer under no_grad, as frozen backbones are run."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.net[:-1](x)
        out: Tensor = self.net[-1](x)
        return out


def test_a_loss_without_a_gradient_is_explained(tmp_path: Path) -> None:
    lora = make_lora(exclude_modules=["net.4"])
    with pytest.raises(ConfigError, match=r"does not depend on anything that trains.*no_grad"):
        make_trainer(tmp_path, lora).fit(FrozenBackbone())


def test_factors_without_a_gradient_are_warned_of(tmp_path: Path) -> None:
    lora = make_lora(exclude_modules=["net.4"], modules_to_save=["net.4"])
    with pytest.warns(UserWarning, match="None of the 4 factors has a gradient.*no_grad"):
        make_trainer(tmp_path, lora, max_epochs=1).fit(FrozenBackbone())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has a gradient")
        make_trainer(tmp_path, make_lora(), max_epochs=1).fit(FrozenBackbone())


def test_factors_that_a_second_optimizer_has(tmp_path: Path) -> None:
    class TwoOptimizers(FrozenBackbone):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            factors = [p for n, p in self.named_parameters() if ".lora." in n]
            return torch.optim.SGD(self.net[-1].parameters(), 0.1), torch.optim.SGD(factors, 0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

    lora = make_lora(exclude_modules=["net.4"], modules_to_save=["net.4"])
    with pytest.warns(UserWarning, match="None of the 4 factors"):
        make_trainer(tmp_path, lora, max_epochs=1).fit(TwoOptimizers())
