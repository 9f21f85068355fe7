"""Two ranks train, score and predict what one process does; a killed fit resumes bitwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_lora import LoRACallback
from lightning_lora.recipes.causal_lm import CausalLM, CausalLMDataModule

root, model_folder, data, devices, packing, kill_at, ckpt, dropout = json.loads(sys.argv[1])
torch.set_num_threads(1)
seed_everything(3)

class Course(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        row = [trainer.global_step, sorted(batch["row"].tolist()), float(outputs["loss"]).hex()]
        with open(f"{root}/course-{trainer.global_rank}.jsonl", "a") as stream:
            stream.write(json.dumps(row) + "\\n")
        if trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

def trainer(*callbacks, **settings):
    return Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        callbacks=[LoRACallback(r=8, dropout=dropout, verbose=False), *callbacks],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, **settings,
    )

model = CausalLM(model_folder, learning_rate=1e-2, max_new_tokens=12)
pairs = CausalLMDataModule(
    train_file=f"{data}/train.csv", validation_file=f"{data}/validation.csv",
    test_file=f"{data}/test.csv", predict_file=f"{data}/test.csv",
    prompt_column="mr", completion_column="ref", packing=packing, max_length=64,
    batch_size=8 // devices, group_by_length=False, cache_dir=f"{root}/cache",
)
keep = ModelCheckpoint(root, "{step}", every_n_train_steps=2, save_top_k=-1)
fit = trainer(Course(), keep, max_epochs=2, num_sanity_val_steps=0)
fit.fit(model, pairs, ckpt_path=ckpt)
scores = {name: float(value) for name, value in fit.callback_metrics.items()}
if not dropout:
    for part in trainer().test(model, pairs, verbose=False):
        scores.update(part)
    trainer(model.prediction_writer(f"{root}/out.jsonl")).predict(
        model, pairs, return_predictions=False
    )
Path(f"{root}/scores-{model.trainer.global_rank}.json").write_text(json.dumps(scores))
"""


def _run(
    root: Path,
    model: Path,
    data: Path,
    devices: int = 1,
    packing: bool = False,
    kill_at: int = -1,
    checkpoint: Path | None = None,
    dropout: float = 0.0,
) -> None:
    root.mkdir(exist_ok=True)
    (root / "script.py").write_text(SCRIPT)
    resumed = None if checkpoint is None else str(checkpoint)
    values = [str(root), str(model), str(data), devices, packing, kill_at, resumed, dropout]
    done = subprocess.run(
        [sys.executable, str(root / "script.py"), json.dumps(values)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == (kill_at == -1), done.stderr


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def _scores(root: Path, rank: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((root / f"scores-{rank}.json").read_text())
    return found


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does(lm_model: Path, lm_data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _run(one, lm_model, lm_data, 1)
    _run(two, lm_model, lm_data, 2)
    courses = [_lines(two / f"course-{rank}.jsonl") for rank in (0, 1)]
    for whole, *parts in zip(_lines(one / "course-0.jsonl"), *courses, strict=True):
        assert sorted(parts[0][1] + parts[1][1]) == whole[1], "the same rows at the same step"
        # Each rank's loss is its share; their mean is the loss over all tokens, of which one rank
        # has more than the other where rows of unlike length meet.
        mean = sum(float.fromhex(part[2]) for part in parts) / 2
        assert mean == pytest.approx(float.fromhex(whole[2]), rel=1e-4)
    expected = _scores(one, 0)
    per_rank = {"train/loss"}
    for rank in (0, 1):
        found = _scores(two, rank)
        assert set(found) == set(expected) > {"val/perplexity", "test/perplexity", "test/bleu"}
        for name in set(expected) - per_rank:
            # A text may turn at a choice that rounding decides; the sums of losses hardly move.
            share = 1e-3 if name.endswith(("loss", "perplexity")) else 0.05
            assert found[name] == pytest.approx(expected[name], rel=share), name
    texts = [[line["generation"] for line in _lines(root / "out.jsonl")] for root in (one, two)]
    assert [line["prompt"] for line in _lines(two / "out.jsonl")] == [
        line["prompt"] for line in _lines(one / "out.jsonl")
    ]
    assert len(texts[1]) == 33
    # Ranks add up gradients in another order, which may turn a choice between two tokens.
    assert sum(a == b for a, b in zip(*texts, strict=True)) > 25
    samples = [_lines(root / "samples.jsonl") for root in (one, two)]
    assert [r["step"] for r in samples[0]] == [r["step"] for r in samples[1]]


@pytest.mark.slow
def test_a_killed_fit_resumes_bitwise_with_samples(
    lm_model: Path, lm_data: Path, tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings: dict[str, Any] = {"packing": True, "dropout": 0.1}
    _run(straight, lm_model, lm_data, **settings)
    _run(killed, lm_model, lm_data, **settings, kill_at=5)
    # Before the validation of the first epoch, whose samples the killed fit has written already.
    _run(killed, lm_model, lm_data, **settings, checkpoint=killed / "step=4.ckpt")
    course = _lines(straight / "course-0.jsonl")
    assert len(course) == 8
    assert _lines(killed / "course-0.jsonl") == course[:5] + course[4:]
    assert _scores(killed, 0) == _scores(straight, 0)
    assert _lines(killed / "samples.jsonl") == _lines(straight / "samples.jsonl")
