"""Exact resume: every checkpoint of a run must lead to the rest of that run, bitwise."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Checkpoint,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_lora.errors import LightningLoRAError
from lightning_lora.resume import ExactResume
from lightning_lora.rng import capture_rng, restore_rng

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*in eval mode"),
]

Event = tuple[Any, ...]


class Resume(Callback):
    """The four calls that a callback has to forward."""

    def __init__(self) -> None:
        self.exact = ExactResume()
        self.trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer
        if stage == "fit":
            self.exact.install(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.exact.uninstall()

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return self.exact.state_dict(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.exact.load_state_dict(state_dict)


class Noisy(torch.utils.data.Dataset):
    """Augments with random numbers of the process that loads: the main one, or a worker."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index] + 0.1 * torch.randn(4)


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(4))

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self.x


class Net(LightningModule):
    """Dropout, and noise from every generator; notes every step and validation in `events`."""

    def __init__(
        self,
        train: Callable[[], Any] = lambda: DataLoader(Noisy(20), 4, shuffle=True),
        validate: Callable[[], Any] | None = None,
        schedule: str = "none",
        manual: bool = False,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.train_loader, self.val_loader = train, validate
        self.schedule = schedule
        self.automatic_optimization = not manual
        self.events: list[Event] = []
        self.fail_at: tuple[int, int] | None = None

    def train_dataloader(self) -> Any:
        return self.train_loader()

    def val_dataloader(self) -> Any:
        return [] if self.val_loader is None else self.val_loader()

    def loss(self, batch: Any) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        noise = random.random() + np.random.rand()
        return sum((self.net(x) - x.sum(1, keepdim=True)).square().mean() for x in parts) + noise

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        if self.fail_at == (self.current_epoch, batch_idx):
            raise RuntimeError("planned")
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        self.events.append(("train", self.current_epoch, batch_idx, loss.item()))
        if self.manual_step(loss, batch_idx):
            return None
        return loss * (self.net[0].weight.square().sum() + 1)

    def manual_step(self, loss: torch.Tensor, batch_idx: int) -> bool:
        if self.automatic_optimization:
            return False
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch) + torch.rand(())
        self.log("val_loss", loss)
        if not self.trainer.sanity_checking:
            self.events.append(("val", self.current_epoch, batch_idx, loss.item()))

    def on_train_epoch_start(self) -> None:
        self.events.append(("epoch", self.current_epoch, torch.rand(()).item()))

    def on_train_epoch_end(self) -> None:
        self.events.append(("epoch end", self.current_epoch, torch.rand(()).item()))

    def on_train_start(self) -> None:
        torch.rand(3)  # a resumed run has this hook once more than an uninterrupted one

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.schedule == "none":
            return optimizer
        if self.schedule == "step":
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]
        if self.schedule == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]
        monitor, interval = self.schedule.split("/")
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return [optimizer], [{"scheduler": plateau, "monitor": monitor, "interval": interval}]


class SaveEverywhere(Checkpoint):
    """Takes a checkpoint in each of the named hooks, with the number of events until there.

    A `Checkpoint`, so that it runs where ModelCheckpoint does: after the other callbacks.
    """

    def __init__(self, folder: Path, *hooks: str) -> None:
        self.folder = folder
        self.taken: dict[Path, int] = {}
        for hook in hooks:
            setattr(self, hook, self._saver(hook))

    def _saver(self, hook: str) -> Callable[..., None]:
        def save(trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.sanity_checking:
                return
            path = self.folder / f"{len(self.taken):03d}-{hook}.ckpt"
            trainer.save_checkpoint(path)
            start = len(pl_module.events)
            while hook == IN_VALIDATION and pl_module.events[start - 1][0] == "val":
                start -= 1  # an unfinished validation is run again
            self.taken[path] = start

        return save


BATCH, BATCH_START, EPOCH = "on_train_batch_end", "on_train_batch_start", "on_train_epoch_end"
VALIDATION, IN_VALIDATION = "on_validation_end", "on_validation_batch_end"


def trainer_for(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **{**defaults, **quiet, **kwargs},
    )


def same_weights(left: Net, right: Net) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def resume(build: Callable[[], Net], folder: Path, path: Path, exact: bool, **kwargs: Any) -> Net:
    seed_everything(7)
    draw_differently()
    net = build()
    callbacks = [Resume()] if exact else []
    # `weights_only`: the state has to consist of tensors and primitives.
    trainer_for(folder, *callbacks, **kwargs).fit(net, ckpt_path=path, weights_only=True)
    return net


def draw_differently(by: int = 99) -> None:
    """Nothing may depend on what the resuming process has drawn. (Ranks differ, too.)"""
    os.environ["PL_GLOBAL_SEED"] = str(by)  # the seed of Lightning's samplers, alike on all ranks
    by += int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(by)
    np.random.seed(by)
    random.seed(by)


def differences(
    folder: Path, build: Callable[[], Net], *hooks: str, exact: bool = True, **kwargs: Any
) -> list[str]:
    """Run once with checkpoints in `hooks`, resume each, and say which runs differ and how."""
    seed_everything(7)
    draw_differently(5)
    whole, saver = build(), SaveEverywhere(folder, *hooks)
    trainer_for(folder, *([Resume()] if exact else []), saver, **kwargs).fit(whole)
    assert saver.taken
    wrong = []
    for path, start in saver.taken.items():
        resumed = resume(build, folder, path, exact, **kwargs)
        if resumed.events != whole.events[start:]:
            wrong.append(f"{path.stem}: {resumed.events} for {whole.events[start:]}")
        elif not same_weights(resumed, whole):
            wrong.append(f"{path.stem}: weights")
    return wrong


def loader(size: int = 20, noisy: bool = True, **kwargs: Any) -> Callable[[], DataLoader]:
    data = Noisy(size) if noisy else TensorDataset(Noisy(size).x)
    collate = None if noisy else (lambda rows: torch.stack([row[0] for row in rows]))
    return lambda: DataLoader(data, 4, collate_fn=collate, **{"shuffle": True, **kwargs})


EVERYWHERE = (BATCH_START, BATCH, VALIDATION, IN_VALIDATION, EPOCH)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_every_checkpoint_leads_to_the_rest_of_the_run(
    tmp_path: Path, shuffle: bool, accumulate: int, schedule: str
) -> None:
    def build() -> Net:
        return Net(loader(shuffle=shuffle), schedule=schedule)

    hooks = (*EVERYWHERE, "on_train_epoch_start")
    assert not differences(tmp_path, build, *hooks, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        ("epoch", {}),
        ("step", {"val_check_interval": 2}),
        ("step", {"val_check_interval": 2, "accumulate_grad_batches": 3}),
        ("epoch", {"check_val_every_n_epoch": 2}),
        ("step", {"check_val_every_n_epoch": None, "val_check_interval": 4}),
        ("val_loss/epoch", {"max_epochs": 3}),
        ("train_loss/step", {}),
        ("none", {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 3}),
        ("none", {"limit_train_batches": 3}),
    ],
    ids=str,
)
def test_with_validation(tmp_path: Path, schedule: str, settings: dict[str, Any]) -> None:
    assert not differences(
        tmp_path, lambda: Net(validate=loader(8), schedule=schedule), *EVERYWHERE, **settings
    )


def test_limited_by_steps(tmp_path: Path) -> None:
    # Lightning does nothing at all when it resumes from the last step: 11 of 12 can be compared.
    settings = {"max_epochs": -1, "max_steps": 12}
    wrong = differences(
        tmp_path, lambda: Net(schedule="train_loss/epoch"), BATCH, EPOCH, **settings
    )
    assert [line.split(":")[0] for line in wrong] == ["013-on_train_batch_end"]
    assert "[] for [('epoch end'" in wrong[0]


LOADERS: dict[str, Callable[[], Any]] = {
    "cycled": lambda: {"long": loader(28)(), "short": loader(8)()},
    "own generator": loader(generator=torch.Generator()),
    "stream": lambda: DataLoader(Stream(20), 4),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(tmp_path: Path, name: str) -> None:
    def build() -> Net:
        net = Net(LOADERS[name], loader(8))
        generator = getattr(net.train_dataloader(), "generator", None) if name != "cycled" else None
        if generator is not None:
            generator.manual_seed(1)  # as a fresh process would have it
        return net

    assert not differences(tmp_path, build, BATCH, VALIDATION, EPOCH, val_check_interval=2)


def test_workers(tmp_path: Path) -> None:
    def build() -> Net:
        return Net(loader(num_workers=2), loader(8, num_workers=1))

    assert not differences(tmp_path, build, VALIDATION, EPOCH, val_check_interval=2)


def test_persistent_workers(tmp_path: Path) -> None:
    workers = {"num_workers": 1, "persistent_workers": True}

    def build() -> Net:
        return Net(loader(noisy=False, **workers), loader(8, noisy=False, **workers))

    assert not differences(tmp_path, build, VALIDATION, EPOCH, val_check_interval=2)


def test_manual_optimization_keeps_gradients(tmp_path: Path) -> None:
    # The last of five batches leaves gradients for the next epoch, which a validation would clear.
    hooks = (BATCH, EPOCH, "on_train_epoch_start")
    assert not differences(tmp_path, lambda: Net(manual=True), *hooks, limit_val_batches=0)


def test_scheduled_accumulation(tmp_path: Path) -> None:
    def build() -> Net:
        net = Net(schedule="step")
        net.configure_callbacks = lambda: [GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})]
        return net

    assert not differences(tmp_path, build, *EVERYWHERE, max_epochs=3)


@pytest.mark.parametrize("wanted", [1, 2])
def test_another_accumulation_without_a_schedule_is_taken(tmp_path: Path, wanted: int) -> None:
    settings = {"max_epochs": 1, "limit_val_batches": 0}
    saver = SaveEverywhere(tmp_path, BATCH)
    trainer_for(tmp_path, Resume(), saver, accumulate_grad_batches=4, **settings).fit(Net())
    trainer = trainer_for(tmp_path, Resume(), accumulate_grad_batches=wanted, **settings)
    trainer.fit(Net(), ckpt_path=tmp_path / f"000-{BATCH}.ckpt", weights_only=True)
    assert trainer.accumulate_grad_batches == wanted
    assert trainer.global_step == {1: 4, 2: 3}[wanted]


class Numbered:
    """A loader that knows its position and restores it itself, as Lightning lets it."""

    def __init__(self) -> None:
        self.rows = Noisy(20).x.split(4)
        self.at = self.start = 0
        self.served: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Numbered:
        self.at, self.start = self.start, 0
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == len(self.rows):
            raise StopIteration
        self.served.append(self.at)
        self.at += 1
        return self.rows[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


@pytest.mark.filterwarnings("error:The position within the epoch")
def test_a_stateful_loader_is_not_skipped_twice(tmp_path: Path) -> None:
    loaders: list[Numbered] = []

    def numbered() -> Numbered:
        loaders.append(Numbered())
        return loaders[-1]

    assert not differences(tmp_path, lambda: Net(numbered), BATCH, EPOCH)
    first_served = [each.served[0] for each in loaders[1:] if each.served]
    assert first_served[:5] == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("hook", [BATCH, EPOCH])
def test_without_exact_resume_the_runs_differ(tmp_path: Path, hook: str) -> None:
    wrong = differences(tmp_path, Net, hook, exact=False, max_epochs=2)
    # What was taken in the last batch of all has nothing left to get wrong.
    assert len(wrong) >= {BATCH: 9, EPOCH: 1}[hook]


def test_following_a_run_does_not_change_it(tmp_path: Path) -> None:
    nets = []
    for callbacks in ([], [Resume()]):
        seed_everything(7)
        nets.append(Net(validate=loader(8)))
        trainer_for(tmp_path, *callbacks).fit(nets[-1])
    assert nets[0].events == nets[1].events
    assert same_weights(*nets)


class Interrupt(Callback):
    """Sends this process a signal in the midst of a batch."""

    def __init__(self, number: signal.Signals, epoch: int, batch: int) -> None:
        self.number, self.at = number, (epoch, batch)

    def on_before_zero_grad(self, *args: Any) -> None:
        """Nothing: the signal belongs after the forward pass."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("cause", "at", "accumulating"),
    [
        ("exception", (1, 2), True),
        ("SIGTERM", (1, 0), True),
        ("SIGTERM", (1, 1), True),  # stops the validation that follows this batch
        ("SIGTERM", (1, 2), False),  # the plateau schedule has seen this batch
    ],
)
def test_interrupted(tmp_path: Path, cause: str, at: tuple[int, int], accumulating: bool) -> None:
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 2}
    if not accumulating:
        settings["accumulate_grad_batches"] = 1

    def build() -> Net:
        return Net(validate=loader(8), schedule="train_loss/step")

    seed_everything(7)
    whole = build()
    trainer_for(tmp_path, Resume(), **settings).fit(whole)

    seed_everything(7)
    stopped = build()
    callbacks: list[Callback] = [Resume(), OnExceptionCheckpoint(tmp_path)]
    if cause == "exception":
        stopped.fail_at = at
    else:
        callbacks.append(Interrupt(signal.SIGTERM, *at))
    with pytest.raises((RuntimeError, SystemExit)):
        trainer_for(tmp_path, *callbacks, **settings).fit(stopped)
    (path,) = tmp_path.glob("*.ckpt")
    (state,) = torch.load(path)["callbacks"]["Resume"]["ranks"]
    names = {name for name, _ in whole.named_parameters()}
    assert set(state["gradients"]) == (names if accumulating else set())

    resumed = resume(build, tmp_path, path, True, **settings)
    if resumed.events[0][0] == "val":  # an unfinished validation is run again
        stopped.events.pop()
    assert stopped.events + resumed.events == whole.events
    assert same_weights(resumed, whole)


def seeded(size: int, seed: Callable[[], int]) -> DataLoader:
    sampler = DistributedSampler(range(size), num_replicas=1, rank=0, seed=seed())
    return loader(size, shuffle=None, sampler=sampler)()


def seed_of_process() -> int:
    return int(os.environ["PL_GLOBAL_SEED"])


@pytest.mark.parametrize("reload", [0, 1])
def test_samplers_that_shuffle_by_a_seed(tmp_path: Path, reload: int) -> None:
    def build() -> Net:
        return Net(lambda: seeded(20, seed_of_process), lambda: seeded(16, seed_of_process))

    settings = {"reload_dataloaders_every_n_epochs": reload, "max_epochs": 3}
    assert not differences(tmp_path, build, BATCH, VALIDATION, EPOCH, **settings)


def test_samplers_that_have_another_seed_in_each_epoch(tmp_path: Path) -> None:
    def build() -> Net:
        net: Net = Net(lambda: seeded(20, lambda: net.current_epoch))
        return net

    settings = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
    assert not differences(tmp_path, build, BATCH, **settings)


def test_a_checkpoint_without_seeds_of_samplers(tmp_path: Path) -> None:
    def build() -> Net:
        return Net(lambda: seeded(20, lambda: 3))

    seed_everything(7)
    whole, saver = build(), SaveEverywhere(tmp_path, BATCH)
    trainer_for(tmp_path, Resume(), saver).fit(whole)
    path, start = list(saver.taken.items())[1]
    content = torch.load(path)
    assert content["callbacks"]["Resume"]["ranks"][0].pop("sampler_seeds")["train"] == [3]
    torch.save(content, path)
    assert resume(build, tmp_path, path, True).events == whole.events[start:]


class Raise(Callback):
    """Raises in a hook, the given time that it is called."""

    def __init__(self, hook: str, call: int, error: type[BaseException]) -> None:
        self.left, self.error = call, error
        setattr(self, hook, self.count)

    def count(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize(
    ("hook", "call"), [("on_after_backward", 5), ("on_before_optimizer_step", 2)]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("manual", [False, True])
def test_interrupted_after_backward(
    tmp_path: Path, hook: str, call: int, error: type[BaseException], manual: bool
) -> None:
    """The gradients then hold a batch that is trained again."""

    def build() -> Net:
        return Net(schedule="none" if manual else "step", manual=manual)

    settings = {} if manual else {"accumulate_grad_batches": 3}
    seed_everything(7)
    whole = build()
    trainer_for(tmp_path, Resume(), **settings).fit(whole)

    seed_everything(7)
    stopped = build()
    callbacks = [Resume(), Raise(hook, call, error), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises((RuntimeError, SystemExit)):
        trainer_for(tmp_path, *callbacks, **settings).fit(stopped)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = resume(build, tmp_path, path, True, **settings)
    assert stopped.events[:-1] + resumed.events == whole.events
    assert same_weights(resumed, whole)


def test_killed_twice(tmp_path: Path) -> None:
    seed_everything(7)
    whole = build_for_kill()
    trainer_for(tmp_path, Resume(), **KILL_SETTINGS).fit(whole)

    for kill in ("0 3", "1 4"):
        run = run_script(tmp_path, "kill", *kill.split())
        assert run.returncode == -signal.SIGKILL, run.stderr
    last = max(tmp_path.glob("step=*.ckpt"), key=os.path.getmtime)
    resumed = resume(build_for_kill, tmp_path, last, True, **KILL_SETTINGS)
    assert resumed.events
    assert resumed.events == whole.events[-len(resumed.events) :]
    assert same_weights(resumed, whole)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    run = run_script(tmp_path, "ddp")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "differences on ranks: [[], []]" in run.stdout


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    checkpoint = tmp_path / "0.ckpt"
    seed_everything(7)
    trainer = trainer_for(tmp_path, Resume(), SaveEverywhere(tmp_path, BATCH), max_epochs=1)
    trainer.fit(Net())
    content = torch.load(tmp_path / "001-on_train_batch_end.ckpt")
    content["callbacks"]["Resume"]["ranks"] *= 2
    torch.save(content, checkpoint)
    with pytest.warns(UserWarning, match=r"written by 2 processes and is resumed by 1"):
        resumed = resume(Net, tmp_path, checkpoint, True, max_epochs=1)
    assert [event[2] for event in resumed.events if event[0] == "train"] == [2, 3, 4]


def test_a_checkpoint_without_the_state_is_said(tmp_path: Path) -> None:
    trainer_for(tmp_path, SaveEverywhere(tmp_path, EPOCH), max_epochs=1).fit(Net())
    with pytest.warns(UserWarning, match="holds no exact-resume state"):
        resume(Net, tmp_path, tmp_path / f"000-{EPOCH}.ckpt", True, max_epochs=2)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(_FitLoop, "_load_combined_loader_states"), (_TrainingEpochLoop, "_get_monitor_value")],
)
def test_a_missing_private_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(LightningLoRAError, match=rf"{name}.*exact_resume=False"):
        trainer_for(tmp_path, Resume()).fit(Net())


def test_the_loops_are_left_as_they_were(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, Resume(), max_epochs=1)
    before = set(vars(trainer.fit_loop)), set(vars(trainer.fit_loop.epoch_loop))
    trainer.fit(Net())
    assert (set(vars(trainer.fit_loop)), set(vars(trainer.fit_loop.epoch_loop))) == before


def test_a_save_by_hand_after_the_fit(tmp_path: Path) -> None:
    def build() -> Net:
        return Net(validate=loader(8), schedule="val_loss/epoch")

    seed_everything(7)
    whole = build()
    trainer_for(tmp_path, Resume(), max_epochs=3).fit(whole)
    seed_everything(7)
    first = build()
    trainer = trainer_for(tmp_path, Resume(), max_epochs=1)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "hand.ckpt")
    resumed = resume(build, tmp_path, tmp_path / "hand.ckpt", True, max_epochs=3)
    assert first.events + resumed.events == whole.events
    assert same_weights(resumed, whole)


def test_a_trainer_that_has_fitted_before(tmp_path: Path) -> None:
    seed_everything(7)
    whole, saver = Net(validate=loader(8)), SaveEverywhere(tmp_path, BATCH)
    trainer = trainer_for(tmp_path, Resume(), saver)
    trainer.fit(whole)
    last_batch, start = list(saver.taken.items())[4]  # its validation is still to come
    resumed = Net(validate=loader(8))
    trainer.fit(resumed, ckpt_path=last_batch, weights_only=True)
    assert resumed.events == whole.events[start:]
    assert same_weights(resumed, whole)


def test_rng_round_trip_covers_every_generator() -> None:
    def draw() -> list[Any]:
        own = torch.rand(2, generator=generator).tolist()
        return [random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist(), own]

    generator = torch.Generator().manual_seed(1)
    draw()  # leaves a cached second Gaussian in `random` and in numpy
    state = capture_rng([generator])
    first = draw()
    assert draw() != first
    restore_rng(state, [generator])
    assert draw() == first


KILL_SETTINGS = {"accumulate_grad_batches": 2, "val_check_interval": 3}


def build_for_kill() -> Net:
    return Net(validate=loader(8), schedule="step")


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def fit_until_killed(folder: Path, epoch: str, batch: str) -> None:
    seed_everything(7)
    checkpoints = ModelCheckpoint(
        folder, "{step}-{epoch}", save_top_k=-1, every_n_train_steps=1, save_last=True
    )
    kill = Interrupt(signal.SIGKILL, int(epoch), int(batch))
    trainer = trainer_for(folder, Resume(), checkpoints, kill, **KILL_SETTINGS)
    trainer.fit(build_for_kill(), ckpt_path="last")


def fit_on_two_ranks(folder: Path) -> None:
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    wrong = differences(
        folder,
        lambda: Net(loader(24, num_workers=1), loader(8), "step"),
        BATCH,
        EPOCH,
        accumulate_grad_batches=2,
        **settings,
    )
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, wrong)
    # Both have the whole list; two writers to one pipe would interleave.
    if torch.distributed.get_rank() == 0:
        print("differences on ranks:", everyone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, mode, *rest = sys.argv[1:]
    {"kill": fit_until_killed, "ddp": fit_on_two_ranks}[mode](Path(target), *rest)
