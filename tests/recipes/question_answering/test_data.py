"""The data module: windows of each split, answers at wrong places, and complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.question_answering import QuestionAnsweringDataModule
from tests.recipes.question_answering.material import question, squad_file

CONTEXT = "the ship ada was seen near rome and left again quietly the old port monday noon"


def _data(qa_model: Path, **settings: Any) -> QuestionAnsweringDataModule:
    defaults: dict[str, Any] = {
        "tokenizer": str(qa_model),
        "max_length": 12,
        "doc_stride": 3,
        "max_question_length": 4,
        "batch_size": 8,
    }
    return QuestionAnsweringDataModule(**{**defaults, **settings})


def _files(qa_data: Path, version: str = "v1", *splits: str) -> dict[str, str]:
    chosen = splits or ("train", "validation", "test", "predict")
    return {f"{split}_file": str(qa_data / f"{version}-{split}.json") for split in chosen}


def test_every_question_is_read_in_windows(qa_model: Path, qa_data: Path) -> None:
    data = _data(qa_model, **_files(qa_data))
    data.setup("fit")
    assert data.allows_no_answer is False
    train, held_out = data.encoded("train"), data.encoded("validation")
    common = {"input_ids", "token_type_ids", "start", "end", "example", "window", "length"}
    assert set(train.features) == common
    decoding = {"cls", "context_start", "offset_starts", "offset_ends"}
    assert set(held_out.features) == common | decoding
    assert {row["example"] for row in held_out} == set(range(90))
    assert [row["window"] for row in train] == list(range(len(train)))
    assert len(train) > 300 * 1.5
    assert max(row["length"] for row in train) == 12
    # Each answer is pointed at by at least one window.
    pointed = {row["example"] for row in train if row["start"] > 0}
    assert pointed == set(range(300))

    batches = list(data.train_dataloader())
    seen = [window for batch in batches for window in batch["window"].tolist()]
    assert sorted(seen) == list(range(len(train))) != seen
    for batch in batches:
        assert set(batch) == {*common - {"length"}, "attention_mask"}
        start, end = batch["start"], batch["end"]
        assert ((start <= end) & (end < batch["attention_mask"].sum(dim=1))).all()
    for batch in data.val_dataloader():
        marked = batch["input_ids"].gather(1, batch["cls"][:, None])
        assert (marked == data.tokenizer.cls_token_id).all()


def test_to_predict_no_answers_are_needed(qa_model: Path, qa_data: Path) -> None:
    data = _data(qa_model, **_files(qa_data, "v1", "predict"))
    data.setup("predict")
    assert data.allows_no_answer is None
    batch = next(iter(data.predict_dataloader()))
    assert "start" not in batch and "offset_starts" in batch
    assert len(data.questions("predict")) == 27
    # Neither v2's file says so without its answers, only its version does.
    second = _data(qa_model, **_files(qa_data, "v2", "predict"))
    second.setup("predict")
    assert second.allows_no_answer is True


def test_whether_answers_may_be_missing(qa_model: Path, tmp_path: Path) -> None:
    answered = {
        "id": "1",
        "question": "who",
        "context": "ada left",
        "answers": {"text": ["ada"], "answer_start": [0]},
    }
    silent = {**answered, "id": "2", "answers": {"text": [], "answer_start": []}}
    (tmp_path / "all.jsonl").write_text(json.dumps(answered))
    (tmp_path / "some.jsonl").write_text(json.dumps(answered) + "\n" + json.dumps(silent))

    def allows(name: str, **settings: Any) -> bool | None:
        data = _data(qa_model, test_file=str(tmp_path / name), **settings)
        data.setup("test")
        return data.allows_no_answer

    assert allows("all.jsonl") is False
    assert allows("some.jsonl") is True
    assert allows("all.jsonl", version_2=True) is True
    assert allows("all.jsonl", version_2=False) is False
    with pytest.raises(DataError, match=r"line 2 \(id 2\): there is no answer.*version_2 is false"):
        allows("some.jsonl", version_2=False)
    data = _data(qa_model, train_file=str(tmp_path / "some.jsonl"))
    data._tables["train"] = data.read_split("train")
    rows = list(data.encoded("train"))
    assert [(row["start"], row["end"]) for row in rows] == [(3, 3), (0, 0)]


def test_held_out_questions_share_no_context_with_training(qa_model: Path, qa_data: Path) -> None:
    data = _data(qa_model, **_files(qa_data, "v1", "train"), validation_share=0.2)
    data.setup("fit")
    train, held_out = data.questions("train"), data.questions("validation")
    assert (len(train), len(held_out)) == (240, 60)
    assert not set(train.contexts) & set(held_out.contexts)
    assert not set(train.ids) & set(held_out.ids)
    assert held_out.where(0).startswith(str(qa_data / "v1-train.json"))
    again = _data(qa_model, **_files(qa_data, "v1", "train"), validation_share=0.2)
    again.setup("fit")
    assert again.questions("validation").ids == held_out.ids


def _wrong_file(folder: Path) -> str:
    return squad_file(
        folder / "wrong.json",
        (
            CONTEXT,
            [
                question("right", ("ada", 9)),
                question("moved", ("rome", 20)),
                question("nowhere", ("oslo", 3)),
            ],
        ),
    )


def test_misplaced_answers_are_reported_once_and_moved(qa_model: Path, tmp_path: Path) -> None:
    file = _wrong_file(tmp_path)
    data = _data(qa_model, train_file=file, validation_file=file, max_length=30)
    with pytest.warns(UserWarning, match="2 answers do not stand") as caught:
        data.setup("fit")
    reports = [str(item.message) for item in caught if "do not stand" in str(item.message)]
    assert len(reports) == 2, "one for each split"
    assert f"{file}, question 2 (id moved): 'rome' is said to start at 20" in reports[0]
    assert "1 are moved" in reports[0] and "the other 1 are not trained on" in reports[0]
    train, held_out = list(data.encoded("train")), list(data.encoded("validation"))
    assert [row["example"] for row in train] == [0, 1]
    place = data.tokenizer(CONTEXT)["input_ids"].index(data.tokenizer.vocab["rome"])
    assert train[1]["start"] == place + 4  # [CLS] who ? [SEP]
    # Scored, but no loss is known for it.
    assert [row["example"] for row in held_out] == [0, 1, 2]
    assert held_out[2]["start"] == -100
    assert data.questions("validation").references[2] == ("oslo",)


def test_misplaced_answers_may_be_skipped_or_refused(qa_model: Path, tmp_path: Path) -> None:
    file = _wrong_file(tmp_path)
    settings: dict[str, Any] = {"train_file": file, "validation_file": file, "max_length": 30}
    moved = _data(qa_model, **settings)
    with pytest.warns(UserWarning, match="1 are moved"):
        moved.setup("fit")
    assert [row["example"] for row in moved.encoded("train")] == [0, 1]
    data = _data(qa_model, **settings, bad_answers="skip")
    with pytest.warns(UserWarning, match="They are not trained on"):
        data.setup("fit")
    assert [row["example"] for row in data.encoded("train")] == [0]
    with pytest.raises(DataError, match=r"question 2 \(id moved\): .*set data.bad_answers to move"):
        _data(qa_model, **settings, bad_answers="refuse").setup("fit")
    only = squad_file(tmp_path / "only.json", (CONTEXT, [question("x", ("oslo", 3))]))
    data = _data(qa_model, test_file=only, train_file=only, validation_file=only)
    with pytest.warns(UserWarning, match="1 answer does not stand"):
        data.setup("fit")
    with pytest.raises(DataError, match="none of the 1 questions has an answer that stands in"):
        data.train_dataloader()


def test_settings_are_no_part_of_each_others_prepared_rows(qa_model: Path, tmp_path: Path) -> None:
    file = squad_file(tmp_path / "a.json", (CONTEXT, [question("1", ("ada", 9))]))
    lengths = []
    for settings in ({"max_length": 12}, {"max_length": 16}, {"doc_stride": 4}, {"max_length": 12}):
        data = _data(qa_model, test_file=file, **settings)
        data.setup("test")
        lengths.append([row["length"] for row in data.encoded("test")])
    assert lengths[0] == lengths[3]
    assert len({tuple(found) for found in lengths}) == 3


def test_long_questions_are_cut_with_a_warning(qa_model: Path, tmp_path: Path) -> None:
    long = {**question("1", ("ada", 9)), "question": "who the ship the ship the ship was"}
    file = squad_file(tmp_path / "a.json", (CONTEXT, [long, question("2", ("ada", 9))]))
    data = _data(qa_model, test_file=file)
    data.setup("test")
    with pytest.warns(UserWarning, match=r"1 questions are longer than .* \(4 tokens\)"):
        data.encoded("test")


def test_windows_fit_the_model(qa_model: Path, tmp_path: Path) -> None:
    long = " ".join([CONTEXT] * 4)
    file = squad_file(tmp_path / "a.json", (long, [question("1", ("ada", 9))]))
    data = _data(qa_model, test_file=file, max_length=384)
    data.setup("test")
    assert [row["length"] for row in data.encoded("test")] == [32, 32, 21]
    data = _data(qa_model, test_file=file, max_length=384, doc_stride=128)
    data.setup("test")
    with pytest.raises(ConfigError, match=r"32 tokens \(all .* or choose a model that takes more"):
        data.test_dataloader()


def test_a_dataset_in_the_layout_of_the_hub(
    qa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    answers = {"text": datasets.List(datasets.Value("string"))}
    features = {name: datasets.Value("string") for name in ("id", "title", "context", "question")}
    columns = datasets.Features(
        {**features, "answers": {**answers, "answer_start": datasets.List(datasets.Value("int32"))}}
    )
    rows = [
        {
            "id": str(number),
            "title": "t",
            "context": CONTEXT,
            "question": "who",
            "answers": {"text": ["ada"], "answer_start": [9]}
            if number
            else {"text": [], "answer_start": []},
        }
        for number in range(3)
    ]
    loaded = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(rows, features=columns)
            for split in ("train", "validation")
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: loaded)
    data = _data(qa_model, dataset="squad_v2", dataset_splits={"predict": "validation"})
    data.setup("fit")
    assert data.allows_no_answer is True
    assert data.questions("train").references == [(), ("ada",), ("ada",)]
    data.setup("predict")
    assert data.questions("predict").where(1) == "squad_v2 [validation], row 2 (id 1)"
    with pytest.raises(DataError, match="has no split 'test'"):
        data.setup("test")


def test_settings_that_are_wrong_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        QuestionAnsweringDataModule(
            doc_stride=-1, max_question_length=0, bad_answers="skipp", batch_size=0
        )
    message = str(caught.value)
    assert "doc_stride is -1" in message
    assert "max_question_length is 0" in message
    assert "bad_answers is 'skipp' (did you mean 'skip'?)" in message
    assert "batch_size is 0" in message
    (tmp_path / "a.csv").write_text("id,question,text\n1,who,x\n")
    with pytest.raises(DataError, match=r"a\.csv has no column 'context'"):
        QuestionAnsweringDataModule(predict_file=str(tmp_path / "a.csv")).setup("predict")
    with pytest.raises(DataError, match="There are no test data"):
        QuestionAnsweringDataModule().setup("test")
