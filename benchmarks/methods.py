"""What the quality benchmarks compare: a recipe untouched, with its head alone trained, with LoRA,
with PEFT's LoRA, and trained whole; on the same data in the same order.

LoRA and PEFT start from the same factors and heads and draw the same dropout masks, so that what
differs between them is the implementation alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from lightning_lora import LoRACallback
from lightning_lora.heads import task_heads
from lightning_lora.recipes.recipe import RecipeModule

METHODS = ("base", "probe", "bitfit", "lora", "peft", "full")
# First guesses of a rate for each method, the same for all tasks.
LEARNING_RATES = {
    "base": 0.0,
    "probe": 1e-2,
    "bitfit": 1e-3,
    "lora": 1e-3,
    "peft": 1e-3,
    "full": 1e-4,
}


@dataclass
class Result:
    """One run: what was run, its scores, the parameters trained and the seconds of the fit."""

    task: str
    method: str
    seed: int
    scores: dict[str, float]
    trained: int
    seconds: float


class SameStart(Callback):
    """Draws the factors A from the layer's name, and seeds the draws of training."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        generator = torch.Generator()
        for name, parameter in sorted(pl_module.named_parameters()):
            if not name.endswith(("lora.A", "lora_A.default.weight")):
                continue
            layer = name.replace("base_model.model.", "").split(".lora")[0]
            generator.manual_seed(self.seed + sum(map(ord, layer)) * 1000003)
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(values)
        torch.manual_seed(self.seed)


def with_peft(kind: type[RecipeModule], r: int, alpha: float) -> type[RecipeModule]:
    """The recipe wrapped by PEFT: every linear layer but the head's, and the head trained."""

    class WithPEFT(kind):  # type: ignore[valid-type, misc]
        def configure_model(self) -> None:
            if self.model is not None:
                return
            super().configure_model()
            import peft

            modules = dict(self.model.named_modules())
            heads = task_heads(modules)
            output = self.model.get_output_embeddings()
            targets = [
                name
                for name, module in modules.items()
                if isinstance(module, nn.Linear)
                and module is not output
                and not any(name == head or name.startswith(f"{head}.") for head in heads)
            ]
            config = peft.LoraConfig(
                r=r, lora_alpha=alpha, target_modules=targets, modules_to_save=heads or None
            )
            self.model = peft.get_peft_model(self.model, config)

    return WithPEFT


def run(
    task: str,
    method: str,
    seed: int,
    kind: type[RecipeModule],
    settings: dict[str, Any],
    data: Any,
    score: Callable[[Trainer, RecipeModule, Any], dict[str, float]],
    r: int = 8,
    alpha: float = 16,
    in_place: bool = False,
    **trainer_settings: Any,
) -> Result:
    """Fit with one method and score the last weights.

    Args:
        task: What the run is called.
        method: One of `METHODS`.
        seed: Seed of head, factors, order and dropout.
        kind: The recipe.
        settings: Its arguments.
        data: The data module.
        score: Returns the scores to report once the model is trained.
        r: Rank of the adapters.
        alpha: Numerator of their scaling.
        in_place: Whether LoRA also trains biases and LayerNorms.
        **trainer_settings: Arguments of the Trainer.
    """
    seed_everything(seed, verbose=False)
    if method == "peft":
        kind = with_peft(kind, r, alpha)
    module = kind(**{"learning_rate": LEARNING_RATES[method], **settings})
    callbacks: list[Callback] = [SameStart(seed)]
    adapted: dict[str, dict[str, Any]] = {
        "probe": {"r": 0},
        "bitfit": {"r": 0, "bias": "all"},
        "lora": {"r": r, **({"bias": "all", "train_layer_norms": True} if in_place else {})},
    }
    if method in adapted:
        callbacks.insert(0, LoRACallback(alpha=alpha, verbose=False, **adapted[method]))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        default_root_dir=tempfile.gettempdir(),
        **trainer_settings,
    )
    start = time.perf_counter()
    trained = 0
    if method != "base":
        trainer.fit(module, data)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    seconds = time.perf_counter() - start
    return Result(task, method, seed, score(trainer, module, data), trained, seconds)


def keep(result: Result, file: Path | None) -> None:
    """Print a result, and append it to a JSON lines file."""
    listed = "  ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    print(
        f"{result.task:10s} {result.method:6s} seed {result.seed}  {listed}  "
        f"{result.trained:,} trained  {result.seconds:.0f} s",
        flush=True,
    )
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")


def parser(
    description: str | None, tasks: Sequence[str], methods: Sequence[str] = METHODS
) -> argparse.ArgumentParser:
    """The arguments that all quality benchmarks take."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--data", type=Path, required=True)
    found.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks)
    found.add_argument("--methods", nargs="+", default=list(methods), choices=methods)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--epochs", type=int, default=3)
    found.add_argument("--rows", type=int, help="training rows, the same for all methods")
    found.add_argument("--lr", type=float, help="instead of each method's own")
    found.add_argument(
        "--in_place", action="store_true", help="LoRA also trains biases and LayerNorms"
    )
    found.add_argument("--precision", default="32-true")
    found.add_argument("--output", type=Path, help="JSON lines file to append results to")
    return found


def run_all(
    arguments: argparse.Namespace, one: Callable[[str, str, int, dict[str, Any]], Result]
) -> None:
    """Run the grid of seeds, tasks and methods, and print the table.

    Args:
        arguments: As parsed by `parser`.
        one: Runs a task with a method and a seed; its last argument are settings of the module.
    """
    results = []
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                settings = {} if arguments.lr is None else {"learning_rate": arguments.lr}
                results.append(one(task, method, seed, settings))
                keep(results[-1], arguments.output)
    print("\n" + table(results))


def table(results: Iterable[Result]) -> str:
    """A Markdown table: mean over the seeds, and each seed's value."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.task, result.method), []).append(result)
    lines = [
        "| task | method | trained | metric | mean | by seed | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (task, method), found in rows.items():
        for name in found[0].scores:
            values = [result.scores[name] for result in found]
            by_seed = " ".join(f"{value:.4f}" for value in values)
            seconds = statistics.median(result.seconds for result in found)
            lines.append(
                f"| {task} | {method} | {found[0].trained:,} | {name} | "
                f"{statistics.mean(values):.4f} | {by_seed} | {seconds:.0f} |"
            )
    return "\n".join(lines)
