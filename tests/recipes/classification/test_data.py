"""The data module: splits, class names, batches, and complaints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes import ClassificationDataModule


@pytest.fixture
def files(tiny_data: Path) -> dict[str, str]:
    splits = ("train", "validation", "test", "predict")
    return {f"{split}_file": str(tiny_data / f"{split}.csv") for split in splits}


def _data(files: dict[str, str], tiny_model: Path, **settings: Any) -> ClassificationDataModule:
    return ClassificationDataModule(**{**files, "tokenizer": str(tiny_model), **settings})


def test_batches_hold_every_row_padded_to_the_longest(
    files: dict[str, str], tiny_model: Path
) -> None:
    data = _data(files, tiny_model, batch_size=10)
    data.setup("fit")
    assert data.class_names == ["neg", "neutral", "pos"]
    batches = list(data.train_dataloader())
    rows = [row for batch in batches for row in batch["row"].tolist()]
    assert sorted(rows) == list(range(96))
    assert rows != sorted(rows), "shuffled"
    for batch in batches:
        assert (batch["labels"] == batch["row"] % 3).all()
        assert batch["input_ids"].shape == (len(batch["row"]), 8)
    held_out = [row for batch in data.val_dataloader() for row in batch["row"].tolist()]
    assert sorted(held_out) == list(range(24))


def test_without_a_validation_file_a_share_is_held_out(
    files: dict[str, str], tiny_model: Path
) -> None:
    parts = []
    for seed in (0, 0, 1):
        settings = {"validation_file": None, "validation_share": 0.25, "split_seed": seed}
        data = _data(files, tiny_model, **settings)
        data.setup("fit")
        train, held_out = data.table("train"), data.table("validation")
        assert (len(train), len(held_out)) == (72, 24)
        lines = {*train.numbers, *held_out.numbers}  # type: ignore[misc]
        assert lines == set(range(2, 98)), "each row in one part"
        parts.append(held_out.numbers)
    assert parts[0] == parts[1] != parts[2]


def test_pairs_become_two_segments_and_are_cut_at_the_length(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "a.tsv").write_text(
        "one\ttwo\tlabel\ngood film\tbad\tx\nthe\tbad plot was bad\ty\n"
    )
    file = str(tmp_path / "a.tsv")
    data = ClassificationDataModule(
        train_file=file,
        validation_file=file,
        text_column=["one", "two"],
        tokenizer=str(tiny_model),
        max_length=6,
        shuffle=False,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch["input_ids"].shape == (2, 6)


def test_length_is_bounded_by_the_models_positions(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'good ' * 50},x\nbad,y\n")
    file = str(tmp_path / "a.csv")
    data = _data({"train_file": file, "validation_file": file}, tiny_model, max_length=1000)
    data.setup("fit")
    assert data.encoded("train")["length"][:] == [32, 3]


def test_prediction_needs_no_labels_and_no_training_data(
    files: dict[str, str], tiny_model: Path
) -> None:
    data = _data({"predict_file": files["predict_file"]}, tiny_model)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["row"].tolist() == list(range(7))
    assert "labels" not in batch
    assert len(data.prediction_columns()["text"]) == 7


def test_a_dataset_with_declared_names_and_withheld_test_labels(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features)
    hidden = datasets.Dataset.from_dict({"text": ["good"], "label": [-1]}, features)
    loaded = datasets.DatasetDict({"train": rows, "dev": rows, "test": hidden})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)
    settings: dict[str, Any] = {"dataset": "owner/name", "tokenizer": str(tiny_model)}
    data = ClassificationDataModule(**settings, dataset_splits={"validation": "dev"})
    data.setup("fit")
    assert data.class_names == ["pos", "neg"]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [0, 1]
    data.setup("predict")
    assert "labels" not in next(iter(data.predict_dataloader()))
    data.class_names = ["pos", "neg"]
    data.table("test")
    with pytest.raises(DataError, match=r"owner/name \[test\], row 1: the column 'label' is empty"):
        data.test_dataloader()
    wrong = ClassificationDataModule(**settings, dataset_splits={"test": "tset"})
    with pytest.raises(DataError, match=r"no split 'tset' \(did you mean 'test'\?\)"):
        wrong.setup("test")


def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str, config: str | None) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name .* cannot be loaded: no route to host"):
        ClassificationDataModule(dataset="owner/name").prepare_data()


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_stage_without_data_names_the_setting(stage: str) -> None:
    split = {"fit": "train", "validate": "validation"}.get(stage, stage)
    with pytest.raises(DataError, match=f"no {split} data: set data.{split}_file"):
        ClassificationDataModule().setup(stage)


def test_an_empty_text_is_named_with_its_line(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\n  ,b\n")
    data = ClassificationDataModule(
        train_file=str(tmp_path / "a.csv"), validation_file=str(tmp_path / "a.csv")
    )
    with pytest.raises(DataError, match=r"a.csv, line 3: the column 'text' is empty"):
        data.setup("fit")


def test_too_few_rows_to_hold_some_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\ny,b\n")
    with pytest.raises(DataError, match=r"2 rows, too few to hold out a share of 0.1"):
        ClassificationDataModule(train_file=str(tmp_path / "a.csv")).setup("fit")


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ClassificationDataModule(
            train_file="a",
            dataset="b",
            text_column=["a", "b", "c"],
            validation_share=1.5,
            batch_size=0,
            dataset_splits={"trian": "x"},
        )
    for part in ("not both", "one column or two", "1.5", "batch_size is 0", "mean 'train'"):
        assert part in str(caught.value)


def test_without_a_tokenizer_the_setting_is_named(files: dict[str, str]) -> None:
    data = ClassificationDataModule(**files)
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        data.train_dataloader()
