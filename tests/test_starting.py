"""Fits that start from an adapter on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_lora import inject_lora, load_adapter, save_adapter
from lightning_lora.errors import CheckpointError
from lightning_lora.state import adapter_state_dict
from tests.models import shake
from tests.modules import Classifier, PlainClassifier, dataset, make_lora, make_trainer
from tests.test_analysis import checkpoint


def started(tmp_path: Path, source: Path, where: str = "init", **settings: Any) -> Any:
    """The state that a fit starts from."""
    module = PlainClassifier() if where == "init" else Classifier(where=where)
    seen: dict[str, torch.Tensor] = {}

    class See(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            state = adapter_state_dict(pl_module)
            seen.update({name: tensor.clone() for name, tensor in state.items()})

    lora = make_lora(init_from=str(source), **settings)
    make_trainer(tmp_path / "run", lora, callbacks=[See()], max_epochs=1).fit(module)
    return seen


def adapter(tmp_path: Path, form: str, **settings: Any) -> tuple[dict[str, torch.Tensor], Path]:
    module = PlainClassifier()
    inject_lora(module, **{"r": 4, "alpha": 12, "bias": "all", **settings})
    shake(module)
    with torch.no_grad():
        module.net[4].bias.add_(1)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
    if form == "peft":
        return state, save_adapter(module, tmp_path / "adapter", "net")
    return state, checkpoint(module, tmp_path / "a.ckpt")


@pytest.mark.parametrize("where", ["init", "configure_model"])
@pytest.mark.parametrize("form", ["peft", "checkpoint"])
def test_the_fit_starts_from_it_bitwise(tmp_path: Path, form: str, where: str) -> None:
    state, source = adapter(tmp_path, form)
    seen = started(tmp_path, source, where, bias="all")
    assert set(seen) == set(state)
    assert all(torch.equal(seen[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "finder",
    [
        LearningRateFinder(num_training_steps=3, update_attr=False, attr_name="lr"),
        BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=1),
        "lr_find",
        "scale_batch_size",
    ],
    ids=lambda finder: finder if isinstance(finder, str) else type(finder).__name__,
)
@pytest.mark.parametrize("start", ["init_from", "eva"])
def test_finders_run_before_a_fit_that_starts_from_it(
    tmp_path: Path, finder: Any, start: str
) -> None:
    class Findable(PlainClassifier):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return DataLoader(dataset(), batch_size=self.batch_size)

    module = Findable(lr=1e-3)
    expected, source = adapter(tmp_path, "checkpoint")
    settings = {"init": "eva"}
    if start == "init_from":
        settings = {"init_from": str(source), "bias": "all"}
    is_callback = not isinstance(finder, str)
    trainer = make_trainer(
        tmp_path / "run",
        make_lora(**settings),
        callbacks=[copy.deepcopy(finder)] if is_callback else [],
        max_epochs=1,
    )
    if not is_callback:
        options: dict[str, Any] = {"attr_name": "lr", "update_attr": False, "num_training": 3}
        if finder == "scale_batch_size":
            options = {"steps_per_trial": 1, "init_val": 2, "max_trials": 1}
        getattr(Tuner(trainer), finder)(module, **options)
    starts: list[dict[str, torch.Tensor]] = []

    class See(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                state = adapter_state_dict(pl_module)
                starts.append({name: tensor.clone() for name, tensor in state.items()})

    trainer.callbacks.append(See())
    trainer.fit(module)
    found = starts[-1]
    if start == "init_from":
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    else:
        for name, A in found.items():
            if name.endswith("lora.A"):
                torch.testing.assert_close(A @ A.t(), torch.eye(len(A)), rtol=1e-4, atol=1e-4)


def test_a_folder_that_peft_wrote_is_a_start(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is a peer to compare with")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0", "3"])
    theirs = peft.get_peft_model(PlainClassifier().net, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "peft")
    seen = started(tmp_path, tmp_path / "peft", target_modules=["0", "3"])
    assert len(seen) == 4
    weights = dict(theirs.named_parameters())
    for name, tensor in seen.items():
        layer, _, leaf = name.removeprefix("net.").partition(".lora.")
        assert torch.equal(tensor, weights[f"base_model.model.{layer}.lora_{leaf}.default.weight"])


@pytest.mark.parametrize("form", ["peft", "checkpoint"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 2}, "r: 4 in the .*, 2 now"),
        ({"alpha": 5}, "alpha: 12 in the .*, 5 now"),
        ({"bias": "none"}, "bias: 'all' in the .*, 'none' now"),
        ({"target_modules": ["0"]}, "target_modules: adapted in the .* alone: (net.)?3"),
    ],
)
def test_settings_that_differ_are_named(
    tmp_path: Path, form: str, settings: dict[str, Any], said: str
) -> None:
    _, source = adapter(tmp_path, form)
    with pytest.raises(CheckpointError, match=said):
        started(tmp_path, source, **{"bias": "all", **settings})


def test_another_base_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    module = PlainClassifier()
    with torch.no_grad():
        module.net[0].weight.add_(1)
    inject_lora(module, r=4, alpha=12)
    with pytest.raises(CheckpointError, match="another base model"):
        started(tmp_path, checkpoint(module, tmp_path / "other.ckpt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no adapter folder"):
        started(tmp_path, tmp_path / "empty")


def test_a_resume_and_a_second_fit_go_on_from_where_they_were(tmp_path: Path) -> None:
    _, source = adapter(tmp_path, "peft", bias="none")
    module = PlainClassifier()
    lora = make_lora(init_from=str(source))
    trainer = make_trainer(tmp_path / "run", lora, max_epochs=1)
    trainer.fit(module)
    first = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
    last = tmp_path / "run/last.ckpt"
    net = PlainClassifier().net
    load_adapter(net, source)
    assert not torch.equal(adapter_state_dict(net)["0.lora.B"], first["net.0.lora.B"])
    # The adapter is gone: nothing reads it again.
    for file in source.iterdir():
        file.unlink()
    again = PlainClassifier()
    second = make_trainer(tmp_path / "run2", make_lora(init_from=str(source)), max_epochs=1)
    second.fit(again, ckpt_path=last)
    assert all(torch.equal(first[name], t) for name, t in adapter_state_dict(again).items())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert not torch.equal(adapter_state_dict(module)["net.0.lora.B"], first["net.0.lora.B"])
