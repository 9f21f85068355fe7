from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, adapter_state_dict, load_lightning_module
from lightning_lora.errors import CheckpointError, ConfigError, TargetError
from lightning_lora.injection import injection_of
from lightning_lora.layers import LoRALinear
from tests.modules import (
    Classifier,
    PlainClassifier,
    base_network,
    dataset,
    make_lora,
    make_trainer,
)

BUILDS = ["init", "setup", "configure_model", "plain"]


def build(where: str = "plain", network: str = "mlp", **options: Any) -> Classifier:
    if where == "plain":
        return PlainClassifier(network, "init", **options)
    return Classifier(network, where, **options)


def logits(model: Classifier, network: str = "mlp") -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(dataset(name=network)[:][0])
    return out


def base_weights(network: str = "mlp") -> dict[str, Tensor]:
    return {f"net.{k}": v for k, v in base_network(network, 0.0).state_dict().items()}


@pytest.mark.parametrize("network", ["mlp", "attention"])
@pytest.mark.parametrize("where", BUILDS)
def test_life_cycle(tmp_path: Path, where: str, network: str) -> None:
    seed_everything(1)
    model = build(where, network, dropout=0.1)
    trainer = make_trainer(tmp_path, make_lora())
    before = trainer.validate(model, verbose=False)[0]["val_loss"]
    trainer.fit(model)
    losses = model.losses
    assert sum(losses[-8:]) < sum(losses[:8])

    # Merged: plain classes, no adapter keys, a changed weight.
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert set(model.state_dict()) == set(base_weights(network))
    changed = [
        k for k, v in base_weights(network).items() if not torch.equal(v, model.state_dict()[k])
    ]
    assert changed and all(k.endswith("weight") for k in changed)

    after = trainer.validate(model, verbose=False)[0]["val_loss"]
    assert after != before
    merged = logits(model, network)
    tested = trainer.test(model, ckpt_path="best", verbose=False)[0]["test_loss"]
    best = float(trainer.checkpoint_callback.best_model_score)  # type: ignore[union-attr, arg-type]
    assert tested == pytest.approx(best, abs=1e-6)

    # last.ckpt gives back the weights that the fit ended with.
    last = trainer.validate(model, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)[0][
        "val_loss"
    ]
    assert last == pytest.approx(after, abs=1e-6)
    torch.testing.assert_close(logits(model, network), merged)

    fresh = build(where, network, dropout=0.1)
    predicted = make_trainer(tmp_path, make_lora()).predict(
        fresh, ckpt_path=str(tmp_path / "last.ckpt")
    )
    torch.testing.assert_close(torch.cat(predicted)[:32], merged[:32])  # type: ignore[arg-type]

    loaded = load_lightning_module(type(model), tmp_path / "last.ckpt")
    torch.testing.assert_close(logits(loaded, network), merged)
    assert not torch.allclose(
        merged, base_network(network, 0.0).eval()(dataset(name=network)[:][0])
    )


def test_each_stage_starts_from_the_exact_base(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append(
                {k: v.clone() for k, v in pl_module.state_dict().items() if "lora" not in k}
            )

        on_test_start = on_sanity_check_start  # type: ignore[assignment]

    model = build()
    trainer = make_trainer(tmp_path, make_lora(), callbacks=[Watch()])
    trainer.fit(model)
    trainer.test(model, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(seen) == 3
    for state in seen:
        for key, value in base_weights().items():
            assert torch.equal(state[key], value), key


def test_second_fit_goes_on_from_the_factors(tmp_path: Path) -> None:
    seed_everything(0)
    model = build()
    trainer = make_trainer(tmp_path, make_lora())
    trainer.fit(model)
    trained = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    started: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            started.update({k: v.clone() for k, v in adapter_state_dict(pl_module).items()})

    make_trainer(tmp_path / "second", make_lora(), callbacks=[Watch()]).fit(model)
    assert started.keys() == trained.keys()
    assert all(torch.equal(started[k], trained[k]) for k in trained)


def test_merged_equals_unmerged_and_not_base(tmp_path: Path) -> None:
    outputs: list[Tensor] = []

    class Watch(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            outputs.append(logits(pl_module))

    model = build()
    make_trainer(tmp_path, make_lora(), callbacks=[Watch()]).fit(model)
    torch.testing.assert_close(logits(model), outputs[0])
    assert not torch.allclose(logits(model), base_network("mlp", 0.0)(dataset()[:][0]), atol=1e-3)


def test_merge_can_be_turned_off(tmp_path: Path) -> None:
    model = build()
    make_trainer(tmp_path, make_lora(merge_on_fit_end=False)).fit(model)
    assert isinstance(model.net[0], LoRALinear)  # type: ignore[index]
    for key, value in base_weights().items():
        assert torch.equal(model.state_dict()[key], value)


def test_merge_from_best(tmp_path: Path) -> None:
    seed_everything(3)
    model = build(lr=0.5)
    trainer = make_trainer(tmp_path, make_lora(merge_from="best"), max_epochs=4)
    trainer.fit(model)
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert Path(checkpoint.best_model_path).name != "epoch=3.ckpt", (
        "the test needs a best that is not the last"
    )
    best = load_lightning_module(PlainClassifier, checkpoint.best_model_path)
    torch.testing.assert_close(logits(model), logits(best))


def test_merge_from_best_without_a_monitor(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[make_lora(merge_from="best"), ModelCheckpoint(tmp_path)],
    )
    with pytest.raises(ConfigError, match="needs a ModelCheckpoint that monitors"):
        trainer.fit(build())


def save_manually(trainer: Trainer, path: Path) -> None:
    trainer.save_checkpoint(path)


def save_weights_only(trainer: Trainer, path: Path) -> None:
    trainer.save_checkpoint(path, weights_only=True)


@pytest.mark.parametrize("save", [save_manually, save_weights_only])
@pytest.mark.parametrize("merged", [True, False])
def test_every_checkpoint_holds_the_adapter_alone(
    tmp_path: Path, save: Callable[[Trainer, Path], None], merged: bool
) -> None:
    model = build()
    trainer = make_trainer(tmp_path, make_lora(bias="lora_only", merge_on_fit_end=merged))
    trainer.fit(model)
    save(trainer, tmp_path / "manual.ckpt")
    names = {"net.0", "net.3", "net.4"}
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        expected = {f"{n}.{leaf}" for n in names for leaf in ("lora.A", "lora.B", "bias")}
        assert set(checkpoint["state_dict"]) == expected, path
        metadata = checkpoint["lightning_lora"]
        assert metadata["version"] == 1
        assert metadata["config"]["r"] == 4
        assert set(metadata["targets"]) == names
        assert metadata["base"]["parameters"] == sum(v.numel() for v in base_weights().values())
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_exception_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    class Fails(PlainClassifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("stop here")

    trainer = make_trainer(
        tmp_path, make_lora(), callbacks=[OnExceptionCheckpoint(tmp_path, "crash")]
    )
    model = Fails("mlp")
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(model)
    checkpoint = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert all(".lora." in key for key in checkpoint["state_dict"])
    assert injection_of(model) is not None and not injection_of(model).merged  # type: ignore[union-attr]


def other_base() -> Classifier:
    model = build()
    with torch.no_grad():
        model.net[3].weight[0, 0] += 1.0  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "r: 4 in the checkpoint, 8 now"),
        ({"alpha": 4}, "alpha: 12 in the checkpoint, 4 now"),
        ({"use_rslora": True}, "scaling: 3.0 in the checkpoint, 6.0 now"),
        ({"target_modules": ["0"]}, "adapted in the checkpoint alone: net.3, net.4"),
        ({"bias": "all"}, "bias: 'none' in the checkpoint, 'all' now"),
    ],
)
def test_resume_with_other_settings_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    make_trainer(tmp_path, make_lora()).fit(build())
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        make_trainer(tmp_path, make_lora(**settings)).fit(
            model, ckpt_path=str(tmp_path / "last.ckpt")
        )
    assert message in str(error.value) and "last.ckpt" in str(error.value)
    state = model.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert all(bool((v == 0).all()) for k, v in state.items() if k.endswith("lora.B"))


def test_resume_on_another_base_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_lora()).fit(build())
    with pytest.raises(CheckpointError, match="trained on another base model"):
        make_trainer(tmp_path, make_lora()).fit(other_base(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_full_model_checkpoint_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_epochs=1).fit(build())
    with pytest.raises(CheckpointError, match="full-model checkpoint"):
        make_trainer(tmp_path, make_lora()).fit(build(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_resume_needs_the_optimizer_state(tmp_path: Path) -> None:
    class TwoGroups(PlainClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = [{"params": [p]} for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(groups, lr=0.01)

    trainer = make_trainer(tmp_path, make_lora())
    trainer.fit(build())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="saved with weights_only=True"):
        make_trainer(tmp_path, make_lora()).fit(build(), ckpt_path=str(tmp_path / "weights.ckpt"))
    make_trainer(tmp_path, make_lora()).test(build(), ckpt_path=str(tmp_path / "weights.ckpt"))
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        make_trainer(tmp_path, make_lora()).fit(
            TwoGroups("mlp"), ckpt_path=str(tmp_path / "last.ckpt")
        )


def test_missing_checkpoint_lists_what_there_is(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(build())
    with pytest.raises(CheckpointError, match=r"not found: .*nope\.ckpt .*last\.ckpt"):
        make_trainer(tmp_path, make_lora()).test(build(), ckpt_path=str(tmp_path / "nope.ckpt"))


@pytest.mark.parametrize("keep", [0, 1000])
def test_truncated_checkpoint(tmp_path: Path, keep: int) -> None:
    make_trainer(tmp_path, make_lora(), max_epochs=1).fit(build())
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="could not be read"):
        make_trainer(tmp_path, make_lora()).fit(build(), ckpt_path=str(path))


def test_optimizer_built_too_early(tmp_path: Path) -> None:
    class Early(PlainClassifier):
        def __init__(self, network: str) -> None:
            super().__init__(network)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    with pytest.raises(
        ConfigError, match=r"6 trainable parameters are in no optimizer.*net\.0\.lora\.A"
    ):
        make_trainer(tmp_path, make_lora()).fit(Early("mlp"))


def test_wrong_targets_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'linear9' matched nothing.*linear1"):
        make_trainer(tmp_path, make_lora(target_modules=["linear9"])).fit(
            build(network="attention")
        )


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    class Normed(PlainClassifier):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.net.append(nn.BatchNorm1d(3))  # type: ignore[operator]

    frozen, trained = Normed(), Normed()
    make_trainer(tmp_path / "a", make_lora()).fit(frozen)
    make_trainer(tmp_path / "b", make_lora(modules_to_save=["net.5"])).fit(trained)
    assert torch.equal(frozen.net[5].running_mean, torch.zeros(3))  # type: ignore[index, arg-type]
    assert not torch.equal(trained.net[5].running_mean, torch.zeros(3))  # type: ignore[index, arg-type]
    saved = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["state_dict"]
    assert {
        "net.5.running_mean",
        "net.5.running_var",
        "net.5.num_batches_tracked",
        "net.5.weight",
    } <= set(saved)
    fresh = load_lightning_module(Normed, tmp_path / "b" / "last.ckpt")
    torch.testing.assert_close(logits(fresh), logits(trained))


def test_learning_rate_finder_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    seed_everything(0)
    model = build()
    trainer = make_trainer(tmp_path, make_lora())
    found = Tuner(trainer).lr_find(model, num_training=12, attr_name="lr", update_attr=False)
    assert found is not None and len(found.results["loss"]) >= 10
    assert all(
        bool((v == 0).all()) for k, v in adapter_state_dict(model).items() if k.endswith("B")
    )
    trainer.fit(model)
    assert set(model.state_dict()) == set(base_weights())


def test_batch_size_finder_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Sized(PlainClassifier):
        batch_size = 2

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(), batch_size=self.batch_size)

    model = Sized("mlp")
    trainer = make_trainer(tmp_path, make_lora())
    Tuner(trainer).scale_batch_size(model, mode="power", max_trials=2, steps_per_trial=2)
    assert model.batch_size > 2
    factors = adapter_state_dict(model)
    assert all(bool((v == 0).all()) for k, v in factors.items() if k.endswith("B"))
    trainer.fit(model)
    assert set(model.state_dict()) == set(base_weights())


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    model = build()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = make_trainer(tmp_path, make_lora(), max_epochs=4, callbacks=[averaging])
    trainer.fit(model)
    assert set(model.state_dict()) == set(base_weights())
    changed = [k for k, v in base_weights().items() if not torch.equal(v, model.state_dict()[k])]
    assert changed and all(k.endswith("weight") for k in changed)


class Rebuilding(PlainClassifier):
    """Builds its network anew in each stage."""

    def setup(self, stage: str) -> None:
        self.net = base_network("mlp", 0.0)


def test_a_network_that_is_built_anew_in_each_stage(tmp_path: Path) -> None:
    module = Rebuilding()
    trainer = make_trainer(tmp_path, make_lora())
    trainer.validate(module)
    trainer.fit(module)
    fitted = {name: value.clone() for name, value in module.net.state_dict().items()}
    (best,) = trainer.test(module, ckpt_path="best")
    (again,) = trainer.test(module, ckpt_path="best")
    assert best == again
    trainer = make_trainer(tmp_path, make_lora())
    trainer.fit(module, ckpt_path=tmp_path / "last.ckpt")
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, fitted[name])


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    class Another(LoRACallback):
        @property
        def state_key(self) -> str:
            return "another"

    trainer = make_trainer(tmp_path, make_lora(), callbacks=[Another(verbose=False)])
    with pytest.raises(ConfigError, match="two LoRACallbacks"):
        trainer.fit(build())


def test_bf16_true_keeps_master_factors(tmp_path: Path) -> None:
    model = build()
    trainer = make_trainer(tmp_path, make_lora(merge_on_fit_end=False), precision="bf16-true")
    trainer.fit(model)
    assert model.net[0].lora.A.dtype == torch.float32  # type: ignore[index, union-attr]
    assert model.net[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_frozen_dtype(tmp_path: Path) -> None:
    model = build()
    trainer = make_trainer(tmp_path, make_lora(frozen_dtype="bf16"), precision="bf16-mixed")
    trainer.fit(model)
    assert model.net[0].weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert model.net[0].bias.dtype == torch.float32  # type: ignore[index, union-attr]
    assert sum(model.losses[-8:]) < sum(model.losses[:8])
    with pytest.raises(ConfigError, match="frozen_dtype"):
        make_trainer(tmp_path, make_lora(frozen_dtype="bf16")).fit(build())
    with pytest.raises(ConfigError, match="frozen_dtype must be"):
        make_lora(frozen_dtype="int3")


def test_invalid_settings_are_reported_at_construction() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        LoRACallback(r=-1, alpha=-1)
    with pytest.raises(
        ConfigError, match=r"2 problems(.|\n)*alpha must be(.|\n)*merge_from must be"
    ):
        LoRACallback(alpha=-1, merge_from="first")


def test_unsupported_strategy_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_lora(), strategy="ddp_spawn", devices=1)
    with pytest.raises(
        ProcessRaisedException, match=r"ConfigError: .*ddp_spawn.* Use strategy='ddp'"
    ):
        trainer.fit(build())


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    trainer = make_trainer(tmp_path, make_lora())
    trainer.fit(model)
    path = tmp_path / "last.ckpt"
    before = path.read_bytes()

    import lightning.fabric.utilities.cloud_io as cloud_io

    class FullDisk(cloud_io.io.BytesIO):  # type: ignore[name-defined]
        def getvalue(self) -> bytes:
            raise OSError(28, "No space left on device")

        getbuffer = getvalue  # type: ignore[assignment]

    monkeypatch.setattr(cloud_io.io, "BytesIO", FullDisk)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".ckpt"] == []


def test_export_of_a_plain_module(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = build()
    lora = make_lora(export_dir=str(tmp_path / "out"))
    make_trainer(tmp_path, lora).fit(model)
    plain = base_network("mlp", 0.0)
    state = {
        k.removeprefix("net."): v
        for k, v in load_file(tmp_path / "out/merged/model.safetensors").items()
    }
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(dataset()[:][0]), logits(model))
    assert lora.exported == {
        "merged model": tmp_path / "out/merged",
        "adapter": tmp_path / "out/adapter",
    }


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    class Data(PlainClassifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / 6)
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(60), batch_size=6, shuffle=True)

    def run(
        root: Path, steps: int, ckpt: str | None = None
    ) -> tuple[list[float], dict[str, Tensor]]:
        seed_everything(5)
        model = Data("mlp", dropout=0.2)
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": 2}
        make_trainer(root, make_lora(dropout=0.1), callbacks=[saver], **options).fit(
            model, ckpt_path=ckpt
        )
        return model.losses, adapter_state_dict(model)

    straight_losses, straight = run(tmp_path / "straight", 12)
    first, _ = run(tmp_path / "cut", 6)
    second, resumed = run(tmp_path / "resumed", 12, str(tmp_path / "cut" / "step=6.ckpt"))
    assert first + second == straight_losses
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
