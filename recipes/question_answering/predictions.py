"""Predicted answers into a file: the official JSON, or one line a question with the n-best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from lightning_lora.recipes.predictions import PredictionFileWriter, replacing_file
from lightning_lora.recipes.question_answering.decoding import Prediction, decode, gather_records
from lightning_lora.recipes.question_answering.questions import Questions

SUFFIXES = (".json", ".jsonl")


class AnswerWriter(PredictionFileWriter):
    """Writes the answers when prediction ends, every question once, from all ranks.

    Args:
        path: A `.json` file becomes SQuAD's `{id: answer}`, with `..._na_prob.json` beside it where
            questions may have no answer: `{id: probability}`, as `evaluate-v2.0.py` takes it. A
            `.jsonl` file gets one line a question, with the best answers and their scores.

    Raises:
        ConfigError: If the suffix is another.
    """

    suffixes = SUFFIXES

    def write(self, trainer: Trainer, module: Any, predictions: Sequence[Any]) -> None:
        """Bring the ranks' windows together and write their answers on the first."""
        records = gather_records(predictions, trainer.world_size)
        if trainer.is_global_zero:
            questions = module.questions("predict")
            decoded = decode(records, questions.contexts, module.hparams["n_best"])
            threshold = module.threshold if module.allows_no_answer else None
            write_answers(self.path, questions, decoded, threshold)


def write_answers(
    path: Path,
    questions: Questions,
    predictions: Sequence[Prediction],
    threshold: float | None = None,
) -> None:
    """Write predictions to a file that appears only when it is complete.

    Args:
        path: A `.json` or `.jsonl` file, as for `AnswerWriter`; its folder is made.
        questions: The questions.
        predictions: What is predicted.
        threshold: Above which "no answer" is the answer; None where every question has one.
    """
    if path.suffix.lower() == ".jsonl":
        with replacing_file(path) as stream:
            for line in _lines(questions, predictions, threshold):
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        return
    answers = {questions.ids[found.row]: found.answer(threshold) for found in predictions}
    _write_json(path, answers)
    if threshold is not None:
        silent = {
            questions.ids[found.row]: no_answer_probability(found.no_answer_score)
            for found in predictions
        }
        _write_json(path.with_name(f"{path.stem}_na_prob{path.suffix}"), silent)


def no_answer_probability(score: float) -> float:
    """Turn how much "no answer" scores above the best answer into its probability against it.

    >>> no_answer_probability(0.0), no_answer_probability(float("inf"))
    (0.5, 1.0)
    """
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def _lines(
    questions: Questions, predictions: Sequence[Prediction], threshold: float | None
) -> Iterator[dict[str, Any]]:
    for found in predictions:
        line: dict[str, Any] = {
            "id": questions.ids[found.row],
            "question": questions.questions[found.row],
            "answer": found.answer(threshold),
        }
        rivals = [candidate.score for candidate in found.candidates]
        if threshold is not None:
            # Infinite where there is no candidate, which JSON cannot write.
            score = found.no_answer_score
            line["no_answer_score"] = round(score, 6) if math.isfinite(score) else None
            rivals.append(found.null_score)
        shares = np.exp(np.array(rivals) - max(rivals)) if rivals else np.array([])
        line["n_best"] = [
            {
                "text": candidate.text,
                "start": candidate.start,
                "end": candidate.end,
                "score": round(candidate.score, 6),
                "probability": round(float(share / shares.sum()), 6),
            }
            for candidate, share in zip(found.candidates, shares, strict=False)
        ]
        yield line


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing_file(path) as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2)
        stream.write("\n")
