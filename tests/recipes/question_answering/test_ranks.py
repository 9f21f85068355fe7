"""Two ranks find the scores, the threshold and the answers that one process finds."""

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
import json, sys
from pathlib import Path
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning_lora import LoRACallback
from lightning_lora.recipes.question_answering import QuestionAnswerer, QuestionAnsweringDataModule

folder, model_folder, data, devices = json.loads(sys.argv[1])
torch.set_num_threads(1)
seed_everything(3)
model = QuestionAnswerer(model_folder)
questions = QuestionAnsweringDataModule(
    train_file=f"{data}/v2-train.json", validation_file=f"{data}/v2-validation.json",
    predict_file=f"{data}/v2-predict.json",
    max_length=14, doc_stride=4, max_question_length=4, batch_size=5, cache_dir=f"{folder}/cache",
)

def trainer(*callbacks):
    return Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        callbacks=[LoRACallback(verbose=False), *callbacks],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )

(scores,) = trainer().validate(model, questions, verbose=False)
threshold = model.threshold
for name in ("a.json", "a.jsonl"):
    trainer(model.prediction_writer(f"{folder}/{name}")).predict(
        model, questions, return_predictions=False
    )
rank = model.trainer.global_rank
Path(f"{folder}/scores-{rank}.json").write_text(json.dumps({**scores, "kept": threshold}))
"""


def _run(folder: Path, qa_model: Path, qa_data: Path, devices: int) -> dict[str, Any]:
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    settings = json.dumps([str(folder), str(qa_model), str(qa_data), devices])
    result = subprocess.run(
        [sys.executable, str(folder / "script.py"), settings],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    scores = [json.loads((folder / f"scores-{rank}.json").read_text()) for rank in range(devices)]
    assert all(found == scores[0] for found in scores)
    return {
        "scores": scores[0],
        "answers": json.loads((folder / "a.json").read_text()),
        "silent": json.loads((folder / "a_na_prob.json").read_text()),
        "lines": [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()],
    }


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(
    qa_model: Path, qa_data: Path, tmp_path: Path
) -> None:
    one = _run(tmp_path / "one", qa_model, qa_data, 1)
    two = _run(tmp_path / "two", qa_model, qa_data, 2)
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-4)
    assert 0 < one["scores"]["val/f1"] < 100 and one["scores"]["kept"] != 0
    assert len(one["answers"]) == 27
    assert len({line["n_best"][0]["text"] for line in one["lines"]}) > 2
    assert list(two["answers"].items()) == list(one["answers"].items())
    assert two["silent"] == pytest.approx(one["silent"], abs=1e-5)
    for first, second in zip(one["lines"], two["lines"], strict=True):
        assert second["id"] == first["id"]
        assert [found["text"] for found in second["n_best"]] == [
            found["text"] for found in first["n_best"]
        ]
