"""Answers in files: SQuAD's own JSON, and lines with the n-best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.question_answering import QuestionAnswerer
from lightning_lora.recipes.question_answering.metrics import evaluate, evaluate_with_no_answers
from tests.recipes.question_answering.material import make_data, make_trainer


def _references(file: Path) -> dict[str, list[str]]:
    content = json.loads(file.read_text())
    return {
        question["id"]: [answer["text"] for answer in question.get("answers", [])]
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    }


def test_answers_are_written_as_the_official_json(
    fitted_v1: Any, qa_model: Path, qa_data: Path, tmp_path: Path
) -> None:
    _, metrics, folder, _ = fitted_v1
    model = QuestionAnswerer(str(qa_model))
    path = tmp_path / "new" / "predictions.json"
    data = make_data(qa_data, "v1", predict_file=str(qa_data / "v1-validation.json"), batch_size=7)
    trainer = make_trainer(model.prediction_writer(path))
    trainer.predict(model, data, ckpt_path=folder / "last.ckpt", return_predictions=False)
    answers = json.loads(path.read_text())
    references = _references(qa_data / "v1-validation.json")
    assert list(answers) == list(references), "in the order of the data"
    scores = evaluate(list(answers.values()), list(references.values()))
    assert scores["f1"] == pytest.approx(metrics["val/f1"], abs=1e-3)
    assert scores["exact_match"] == pytest.approx(metrics["val/exact_match"], abs=1e-3)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.json"]


def test_no_answers_and_their_probabilities_are_written(
    fitted_v2: Any, qa_model: Path, qa_data: Path, tmp_path: Path
) -> None:
    _, metrics, folder, _ = fitted_v2
    data = make_data(qa_data, "v2", predict_file=str(qa_data / "v2-validation.json"))
    for name in ("a.json", "a.jsonl"):
        model = QuestionAnswerer(str(qa_model))
        trainer = make_trainer(model.prediction_writer(tmp_path / name))
        trainer.predict(model, data, ckpt_path=folder / "last.ckpt", return_predictions=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.json",
        "a.jsonl",
        "a_na_prob.json",
    ]
    answers = json.loads((tmp_path / "a.json").read_text())
    silent = json.loads((tmp_path / "a_na_prob.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    references = _references(qa_data / "v2-validation.json")
    scores = evaluate(list(answers.values()), list(references.values()))
    assert scores["f1"] == pytest.approx(metrics["val/f1"], abs=1e-3)
    assert list(answers) == list(silent) == [line["id"] for line in lines] == list(references)
    assert {line["id"]: line["answer"] for line in lines} == answers
    contexts = data.questions("predict").contexts
    for context, line in zip(contexts, lines, strict=True):
        assert 1 <= len(line["n_best"]) <= 20
        rivals = [candidate["score"] for candidate in line["n_best"]]
        assert rivals == sorted(rivals, reverse=True)
        assert sum(candidate["probability"] for candidate in line["n_best"]) < 1 + 1e-4
        for candidate in line["n_best"]:
            assert context[candidate["start"] : candidate["end"]] == candidate["text"]
        probability = 1 / (1 + 2.718281828 ** -line["no_answer_score"])
        assert silent[line["id"]] == pytest.approx(probability, abs=1e-4)
        quiet = line["no_answer_score"] > model.threshold
        assert line["answer"] == ("" if quiet else line["n_best"][0]["text"])
    # What the official script makes of both files: the best answers and their probabilities.
    best = [line["n_best"][0]["text"] for line in lines]
    found = evaluate_with_no_answers(best, list(silent.values()), list(references.values()))
    assert found["best_f1"] == pytest.approx(metrics["val/f1"], abs=1e-3)


def test_predicting_without_answers_takes_what_was_trained(
    fitted_v2: Any, qa_model: Path, qa_data: Path, tmp_path: Path
) -> None:
    """A flat file says nothing about missing answers; the checkpoint does."""
    _, _, folder, thresholds = fitted_v2
    file = tmp_path / "ask.csv"
    context = "the ship was seen near oslo and left again quietly"
    file.write_text(f"id,question,context\n1,when,{context}\n2,where,{context}\n")
    for allowed, answers in ((None, {"1": "", "2": "oslo"}), (False, {"1": None, "2": "oslo"})):
        model = QuestionAnswerer(str(qa_model))
        data = make_data(qa_data, "v2", predict_file=str(file), version_2=allowed)
        trainer = make_trainer(model.prediction_writer(tmp_path / "a.json"))
        trainer.predict(model, data, ckpt_path=folder / "last.ckpt", return_predictions=False)
        assert model.threshold == thresholds[-1]
        written = json.loads((tmp_path / "a.json").read_text())
        if allowed is None:
            assert written == answers
        else:
            assert written["2"] == "oslo" and written["1"]


def test_answers_go_to_files_of_a_known_kind(qa_model: Path, tmp_path: Path) -> None:
    model = QuestionAnswerer(str(qa_model))
    assert model.predictions_suffix == ".json"
    with pytest.raises(ConfigError, match=r"\.json or \.jsonl"):
        model.prediction_writer(tmp_path / "a.csv")
