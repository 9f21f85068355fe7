"""The nine tasks in GLUE's own file layouts and from a dataset laid out like the hub's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lora import LoRACallback
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes import GlueDataModule, TextClassifier
from lightning_lora.recipes.classification.glue import TASKS

# A training row of each task as it stands in GLUE's archive: names of the columns, and fields.
LAYOUTS: dict[str, tuple[str | None, list[str]]] = {
    "cola": (None, ["gj04\t1\t\tthe film was good", "gj04\t0\t*\tthe was film bad"]),
    "sst2": ("sentence\tlabel", ["the film was good\t1", "the film was bad\t0"]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t7\t8\ta "good film\tthe film', "0\t9\t10\ta bad film\tthe plot"],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tm\tf\t2012\t1\tn\tn\tthe film\ta film\t5.000", "1\tm\tf\ty\t2\tn\tn\tbad\tgood\t0.2"],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\tgood film\tgreat film\t1", "broken", "4\t5\t6\tbad\tthe plot\t0"],
    ),
    "mnli": (
        "index\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\tg\tx\ta film\tthe film\tneutral\tneutral", "1\tg\tx\tbad\tgood\te\tcontradiction"],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\twas the film good\tthe film\tentailment", "1\tthe plot\tbad\tnot_entailment"],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tthe film\ta film\tentailment", "1\tbad\tgood\tnot_entailment"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\tthe film\ta film\t1", "1\tbad\tgood\t0"]),
}
EXPECTED = {
    "cola": ["acceptable", "unacceptable"],
    "sst2": ["positive", "negative"],
    "mrpc": ["equivalent", "not_equivalent"],
    "stsb": [5.0, 0.2],
    "qqp": ["duplicate", "not_duplicate"],
    "mnli": ["neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["entailment", "not_entailment"],
}


def write_task(folder: Path, task: str, times: int = 4) -> Path:
    """Write a task's folder: training, development and unlabelled test files."""
    header, rows = LAYOUTS[task]
    folder.mkdir()
    text = "\n".join([*([header] if header else []), *rows * times]) + "\n"
    (folder / "train.tsv").write_text(text)
    for name in ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",):
        (folder / f"{name}.tsv").write_text(text)
    texts = TASKS[task].texts
    renamed = {hub: own for own, hub in TASKS[task].renamed}
    names = ["index", *(renamed.get(name, name) for name in texts)]
    lines = ["\t".join(names), *("\t".join([str(n), *["good film"] * len(texts)]) for n in (0, 1))]
    test = "test_matched" if task == "mnli" else "test"
    (folder / f"{test}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def _trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.filterwarnings("ignore:.*were left out")
@pytest.mark.parametrize("task", list(TASKS))
def test_a_task_trains_scores_and_predicts_from_glues_files(
    task: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = GlueDataModule(task, data_dir=str(write_task(tmp_path / task, task)), batch_size=4)
    model = TextClassifier(str(tiny_model))
    trainer = _trainer(max_steps=2, callbacks=[LoRACallback(verbose=False)])
    trainer.fit(model, data)
    names = [f"val/{metric}" for metric in TASKS[task].metrics]
    names += ["val_mismatched/accuracy"] * (task == "mnli")
    assert {*names} <= set(trainer.callback_metrics)
    assert model.monitor == names[0]
    rows = data.encoded("train")
    labels = rows["label"][:]
    if TASKS[task].classes:
        assert model.class_names == list(TASKS[task].classes)
        labels = [model.class_names[number] for number in labels]
    assert labels[:2] == EXPECTED[task]
    assert not data.provides("test")

    output = tmp_path / "answers.tsv"
    writer = model.prediction_writer(output)
    _trainer(callbacks=[LoRACallback(verbose=False), writer]).predict(model, data)
    with output.open() as stream:
        answers = list(csv.DictReader(stream, delimiter="\t"))
    assert [answer["index"] for answer in answers] == ["0", "1"]
    if TASKS[task].classes:
        assert {answer["prediction"] for answer in answers} <= set(TASKS[task].classes)
    else:
        assert all(abs(float(answer["prediction"])) < 10 for answer in answers)
    with pytest.raises(DataError, match=r"test sets are withheld"):
        data.setup("test")


def test_corrupt_lines_are_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    data = GlueDataModule("qqp", data_dir=str(write_task(tmp_path / "qqp", "qqp")))
    with pytest.warns(UserWarning, match="4 lines .* left out, the first of them line 3"):
        assert len(data.table("train")) == 8


def test_a_labelled_test_file_can_be_scored(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "sst2", "sst2")
    (folder / "test.tsv").write_text("sentence\tlabel\nthe film was good\t1\n")
    data = GlueDataModule("sst2", data_dir=str(folder))
    assert data.provides("test")
    model = TextClassifier(str(tiny_model), class_names=list(TASKS["sst2"].classes))
    assert "test/accuracy" in _trainer().test(model, data, verbose=False)[0]


def test_the_hub_gives_the_same_classes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    classes = datasets.ClassLabel(names=list(TASKS["mnli"].classes))
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": classes,
        }
    )
    texts = {"premise": ["a film", "bad"], "hypothesis": ["the film", "good"]}
    rows = datasets.Dataset.from_dict({**texts, "label": [1, 2]}, features)
    hidden = datasets.Dataset.from_dict({**texts, "label": [-1, -1]}, features)
    names = ["train", "validation_matched", "validation_mismatched"]
    loaded = datasets.DatasetDict(dict.fromkeys(names, rows), test_matched=hidden)
    asked = []

    def load(name: str, config: str | None) -> Any:
        asked.append((name, config))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = GlueDataModule("mnli", tokenizer=str(tiny_model))
    data.setup("fit")
    data.prepare_data()
    assert set(asked) == {("nyu-mll/glue", "mnli")}
    assert data.class_names == list(TASKS["mnli"].classes)
    for loader in data.val_dataloader():
        assert sorted(next(iter(loader))["labels"].tolist()) == [1, 2]
    data.setup("predict")
    assert "labels" not in next(iter(data.predict_dataloader()))
    assert not data.provides("test")


def test_unknown_tasks_and_files_beside_the_task_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'sst-2' \(did you mean 'sst2'\?\)"):
        GlueDataModule("sst-2")
    with pytest.raises(ConfigError, match=r"data\.train_file is not used with data\.task"):
        GlueDataModule("sst2", train_file="a.tsv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*train\.tsv"):
        GlueDataModule("sst2", data_dir=str(tmp_path)).setup("fit")


def test_a_score_that_is_no_number_is_placed(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "stsb", "stsb")
    text = (folder / "train.tsv").read_text().replace("\t0.2", "\tlow", 1)
    (folder / "train.tsv").write_text(text)
    data = GlueDataModule("stsb", data_dir=str(folder), tokenizer=str(tiny_model))
    data.setup("fit")
    message = (
        r"train\.tsv, line 3: the column 'label' holds 'low' where a regression needs a number"
    )
    with pytest.raises(DataError, match=message):
        data.train_dataloader()


def test_a_regression_compares_each_row_with_its_own_value(tiny_model: Path) -> None:
    torch.manual_seed(0)
    model = TextClassifier(str(tiny_model), problem_type="regression")
    model.setup("fit")
    model.configure_model()
    model.log_training = lambda loss, count: None  # type: ignore[method-assign]
    batch = {"input_ids": torch.randint(4, 9, (3, 5)), "labels": torch.tensor([1.0, 2.0, 5.0])}
    values = model.eval()(batch)
    assert values.shape == (3, 1)
    expected = sum((values[i, 0] - batch["labels"][i]) ** 2 for i in range(3)) / 3
    assert torch.allclose(model.training_step(batch, 0), expected)
