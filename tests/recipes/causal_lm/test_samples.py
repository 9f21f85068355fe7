"""Samples before, during and after a fit: seen, kept, logged, and without influence on the fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from lightning_lora.recipes.causal_lm import CausalLM, CausalLMDataModule
from lightning_lora.recipes.causal_lm.batches import ExampleCollator
from lightning_lora.recipes.causal_lm.samples import SAMPLES_FILE, SamplePrompts
from tests.recipes.causal_lm.material import make_trainer


def _data(folder: Path, **settings: Any) -> CausalLMDataModule:
    return CausalLMDataModule(
        train_file=str(folder / "train.csv"),
        validation_file=str(folder / "validation.csv"),
        prompt_column="mr",
        completion_column="ref",
        max_length=64,
        batch_size=16,
        **settings,
    )


def _model(folder: Path, **settings: Any) -> CausalLM:
    defaults = {"learning_rate": 1e-2, "max_new_tokens": 20}
    return CausalLM(str(folder), **{**defaults, **settings})


def _records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / SAMPLES_FILE).open(encoding="utf-8")]


def test_samples_come_before_during_and_after(
    lm_model: Path, lm_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed_everything(0)
    trainer = make_trainer(max_epochs=4, default_root_dir=tmp_path, logger=CSVLogger(tmp_path))
    data = _data(lm_data)
    trainer.fit(_model(lm_model), data)
    records = _records(Path(str(trainer.log_dir)))
    steps = [(0, "before the fit"), *((6 * n, "during the fit") for n in (1, 2, 3, 4))]
    steps.append((24, "after the fit"))
    assert [(r["step"], r["moment"]) for r in records] == [step for step in steps for _ in range(3)]
    prompts = list(dict.fromkeys(data.table("validation").columns["mr"]))[:3]
    assert [r["prompt"] for r in records] == prompts * 6
    first, last = (" ".join(r["generation"] for r in part) for part in (records[:3], records[-3:]))
    assert last != first and last.count("serves") > first.count("serves")
    assert [r["generation"] for r in records[-6:-3]] == [r["generation"] for r in records[-3:]]
    printed = " ".join(capsys.readouterr().out.split())
    for moment in ("before the fit (step 0)", "during the fit (step 6)", "after the fit (step 24)"):
        assert f"Samples {moment}" in printed
    assert "prompt before after" in printed


def test_prompts_can_be_given_or_left_out(lm_model: Path, lm_data: Path, tmp_path: Path) -> None:
    given = ["name[Aromi], food[Indian]"]
    data = _data(lm_data)
    model = _model(lm_model, sample_prompts=given, learning_rate=0.0)
    make_trainer(max_steps=1, default_root_dir=tmp_path).fit(model, data)
    assert [r["prompt"] for r in _records(tmp_path)] == given * 2
    # As the data put theirs: on a line of its own.
    (row,) = data.sample_prompts(given)
    assert data.tokenizer.decode(row["input_ids"]) == f"{given[0]}\n"
    none = tmp_path / "none"
    assert _model(lm_model, sample_prompts=[]).configure_callbacks() == []
    trainer = make_trainer(max_steps=1, default_root_dir=none)
    trainer.fit(_model(lm_model, sample_prompts=[]), data)
    assert not (none / SAMPLES_FILE).exists()


def test_loggers_that_take_texts_get_them(lm_model: Path, lm_data: Path, tmp_path: Path) -> None:
    class Silent(Logger):
        name, version = "silent", 0

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            pass

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    class Board(Silent):
        """As TensorBoard's: the experiment takes texts."""

        def __init__(self) -> None:
            super().__init__()
            self.experiment = self
            self.texts: list[tuple[str, str, int]] = []

        def add_text(self, tag: str, text: str, global_step: int) -> None:
            self.texts.append((tag, text, global_step))

    class Tables(Silent):
        """As Weights & Biases': the logger itself does."""

        def __init__(self) -> None:
            super().__init__()
            self.texts: list[Any] = []

        def log_text(self, key: str, columns: Any, data: Any, step: int) -> None:
            self.texts.append((key, columns, data, step))

    board, tables = Board(), Tables()
    trainer = make_trainer(max_steps=1, default_root_dir=tmp_path, logger=[board, tables])
    trainer.fit(_model(lm_model, sample_prompts=["Hi"]), _data(lm_data))
    texts = [record["generation"] for record in _records(tmp_path)]
    assert [(tag, step) for tag, _, step in board.texts] == [("samples/0", 0), ("samples/0", 1)]
    assert [text for _, text, _ in board.texts] == [f"**Hi**\n\n{text}" for text in texts]
    assert [(data, step) for _, _, data, step in tables.texts] == [
        ([["Hi", texts[0]]], 0),
        ([["Hi", texts[1]]], 1),
    ]


def test_the_fit_takes_the_same_course_with_and_without(
    lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    class Course(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.modes: set[bool] = set()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))
            self.modes |= {part.training for part in module.modules()}

    def run(prompts: list[str] | None) -> tuple[Course, torch.Tensor]:
        seed_everything(3)
        course = Course()
        trainer = make_trainer(course, max_epochs=2, default_root_dir=tmp_path)
        trainer.callbacks[0].config.dropout = 0.2  # type: ignore[attr-defined]
        # What the hub's own settings draw must not be drawn here.
        model = _model(lm_model, sample_prompts=prompts, do_sample=True, temperature=2.0)
        trainer.fit(model, _data(lm_data))
        return course, torch.get_rng_state()

    (course, state), (without, state_without) = run(None), run([])
    assert course.losses == without.losses and len(course.losses) == 12
    assert torch.equal(state, state_without)
    assert course.modes == {True}


def test_a_resumed_fit_goes_on_where_its_checkpoint_was(
    lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    def fit(root: Path, epochs: int, checkpoint: Path | None = None) -> None:
        seed_everything(5)
        keep = ModelCheckpoint(root, "{epoch}", save_top_k=-1, monitor=None)
        trainer = make_trainer(
            keep, max_epochs=epochs, default_root_dir=root, enable_checkpointing=True
        )
        trainer.callbacks[0].config.dropout = 0.1  # type: ignore[attr-defined]
        model = _model(lm_model, schedule="constant", warmup=0)
        trainer.fit(model, _data(lm_data), ckpt_path=checkpoint)

    fit(tmp_path / "straight", 4)
    fit(tmp_path / "parts", 3)
    # From an earlier checkpoint than the last: what came after it is written anew.
    fit(tmp_path / "parts", 4, tmp_path / "parts" / "epoch=1.ckpt")
    assert _records(tmp_path / "parts") == _records(tmp_path / "straight")
    saved = [torch.load(tmp_path / part / "epoch=3.ckpt", weights_only=True)["state_dict"]
             for part in ("straight", "parts")]  # fmt: skip
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    # A new fit in the same folder begins anew.
    fit(tmp_path / "parts", 1)
    assert {record["step"] for record in _records(tmp_path / "parts")} == {0, 6}


def test_data_without_prompts_have_no_samples(
    lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    data = _data(lm_data, tokenizer=str(lm_model))
    rows = data.encoded("train")
    loader = DataLoader(rows, batch_size=8, collate_fn=ExampleCollator(0, False))
    make_trainer(max_steps=1, default_root_dir=tmp_path).fit(_model(lm_model), loader)
    assert not (tmp_path / SAMPLES_FILE).exists()


def test_plain_text_is_continued_from_its_beginnings(lm_model: Path, tmp_path: Path) -> None:
    lines = [f"{name} serves food to all who come near the river and the station.\n\n" * 3
             for name in ("Aromi", "Cocum", "Strada", "Giraffe")]  # fmt: skip
    (tmp_path / "a.txt").write_text("".join(lines))
    data = CausalLMDataModule(
        validation_file=str(tmp_path / "a.txt"), documents="paragraph", tokenizer=str(lm_model)
    )
    prompts = [row["prompt"] for row in data.sample_prompts(None)]
    assert [prompt.split()[0] for prompt in prompts] == ["Aromi", "Cocum", "Strada"]
    assert SamplePrompts().prompts is None
