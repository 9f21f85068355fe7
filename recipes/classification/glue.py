"""The nine tasks of GLUE: their columns, classes and metrics, from the hub or from GLUE's files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.classification.data import ClassificationDataModule
from lightning_lora.recipes.classification.labels import label_text
from lightning_lora.recipes.classification.problems import REGRESSION, SINGLE_LABEL
from lightning_lora.recipes.files import Table, is_empty, nearest, read_table, resolve_path

DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        texts: The text columns, by their names on the hub.
        classes: The classes in the order of GLUE's numbers; none for a regression.
        metrics: What GLUE reports; the best checkpoint is chosen by the first.
        renamed: Names of columns in GLUE's files where they differ from the hub's.
        header: Columns of training and development files that have no line of names.
        matched: Whether there is a second, mismatched set of each evaluation split.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    renamed: tuple[tuple[str, str], ...] = ()
    header: tuple[str, ...] | None = None
    matched: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_DUPLICATE = ("not_duplicate", "duplicate")
TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1_positive"),
        (("#1 String", "sentence1"), ("#2 String", "sentence2"), ("Quality", "label")),
    ),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman"), (("score", "label"),)),
    "qqp": GlueTask(
        ("question1", "question2"),
        _DUPLICATE,
        ("accuracy", "f1_positive"),
        (("is_duplicate", "label"),),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        renamed=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
        matched=True,
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(_PAIR, _ENTAILMENT),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}


class GlueDataModule(ClassificationDataModule):
    """One task of GLUE, with its columns, classes and metrics settled.

    The data come from the hub, or from a folder in the layout of GLUE's own archive (`train.tsv`,
    `dev.tsv`, `test.tsv`; for MNLI `dev_matched.tsv` and `dev_mismatched.tsv`). Both give the same
    classes, so that checkpoints go with either. MNLI's mismatched development set is scored
    beside the matched one, as `val_mismatched/accuracy`.

    The labels of GLUE's test sets are withheld: `predict` takes the test set, and predictions
    written to a `.tsv` file are in the format of GLUE's server.

    Args:
        task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli`, `rte` or `wnli`.
        data_dir: Folder with the task's files, instead of the hub.
        predict_file: File to predict, in the test file's layout; by default the test set.
        max_length: Longest input in tokens; the rest is cut off.
        **kwargs: As for `ClassificationDataModule`.

    Raises:
        ConfigError: If there is no such task, or settings contradict each other.

    Example:
        >>> data = GlueDataModule("stsb", data_dir="glue/STS-B")
        >>> data.problem_type, data.metrics
        ('regression', ['pearson', 'spearman'])
    """

    def __init__(
        self,
        task: str,
        data_dir: str | None = None,
        predict_file: str | None = None,
        max_length: int = 512,
        **kwargs: Any,
    ) -> None:
        if task not in TASKS:
            raise ConfigError(
                f"data.task is {task!r}{nearest(task, TASKS)}; the tasks of GLUE are "
                f"{', '.join(TASKS)}."
            )
        self.task = TASKS[task]
        files = [name for name in ("train", "validation", "test") if kwargs.get(f"{name}_file")]
        if files:
            raise ConfigError(
                f"data.{files[0]}_file is not used with data.task: name the folder of the task's "
                "files with data.data_dir, or use ClassificationDataModule."
            )
        matched = "_matched" if self.task.matched else ""
        settled: dict[str, Any] = {
            "text_column": list(self.task.texts),
            "problem_type": SINGLE_LABEL if self.task.classes else REGRESSION,
            "metrics": list(self.task.metrics),
            "max_length": max_length,
            "predict_file": predict_file,
        }
        if data_dir is None:
            settled |= {"dataset": DATASET, "dataset_config": task}
            if matched:
                names = {"validation": "validation_matched", "test": "test_matched"}
                settled["dataset_splits"] = {**names, "predict": "test_matched"}
        else:
            folder = Path(data_dir)
            settled |= {
                "train_file": str(folder / "train.tsv"),
                "validation_file": str(folder / f"dev{matched}.tsv"),
                "test_file": str(folder / f"test{matched}.tsv"),
                "predict_file": predict_file or str(folder / f"test{matched}.tsv"),
            }
        kwargs.update(settled)
        super().__init__(**kwargs)
        if self.task.matched:
            self.extra_validation = ["mismatched"]

    def provides(self, split: str) -> bool:
        """Say whether there are data; the labels of a test set count only if they are there."""
        if split != "test":
            return super().provides(split)
        if self.dataset is not None:
            return False
        try:
            return "label" in self.table("test").columns
        except DataError:
            return False

    def read_split(self, split: str) -> Table:
        """Read the rows of a split, with the hub's names of columns and classes.

        Raises:
            DataError: If they are missing, or not what GLUE's files hold.
        """
        if self.dataset is not None:
            return super().read_split(split)
        return self._read_file(self.file_of(split), labelled=split == "test")

    def extra_split(self, name: str) -> Table:
        """Read MNLI's mismatched development set."""
        if self.dataset is not None:
            return self.read_hub_split("validation", f"validation_{name}")
        matched = Path(self.file_of("validation"))
        return self._read_file(str(matched.with_name(f"dev_{name}.tsv")))

    def _read_file(self, file: str, labelled: bool = False) -> Table:
        table = read_table(
            file,
            quoting=False,
            cache_dir=self.cache_dir,
            header=self._header(file),
            skip_malformed=True,
        )
        renamed = dict(self.task.renamed)
        columns = {renamed.get(name, name): values for name, values in table.columns.items()}
        if labelled and self.label_column not in columns:
            raise DataError(
                f"{table.source} has no labels: those of GLUE's test sets are withheld. Use "
                "`validate`, or `predict` and hand the predictions in at GLUE's server."
            )
        names = self.task.classes
        if names and "label" in columns:
            numbers = {str(number): name for number, name in enumerate(names)}
            given = columns["label"]
            columns["label"] = [
                value if is_empty(value) else numbers.get(label_text(value), value)
                for value in given
            ]
        return replace(table, columns=columns, class_names=list(names) or None)

    def _header(self, file: str) -> tuple[str, ...] | None:
        """CoLA's files have a line of names in the test set only."""
        if self.task.header is None:
            return None
        with resolve_path(file).open(encoding="utf-8") as stream:
            first = stream.readline().rstrip("\n").split("\t")
        return None if set(first) & {"sentence", "index"} else self.task.header
