"""A few prompts continued before, during and after a fit, to see what a model learns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora import FSDP2Strategy
from lightning_lora.recipes.causal_lm.batches import PromptCollator
from lightning_lora.recipes.predictions import replacing_file

SAMPLES_FILE = "samples.jsonl"
BEFORE, DURING, AFTER = "before the fit", "during the fit", "after the fit"
_LONGEST = 64
_AT_A_TIME = 8
_SHOWN = 240


class SamplePrompts(Callback):
    """Continues prompts before the fit, after each validation, and after the fit.

    The texts are printed, written to `samples.jsonl` in the run's folder of logs, and given to the
    loggers that take texts (TensorBoard, Weights & Biases). They are chosen greedily and without
    dropout, so that no random number is drawn: a fit takes the same course with and without them,
    and resumes exactly. All ranks generate alike, as a sharded model needs.

    A callback and no part of the module's own hooks: who wants none has none, and the module stays
    what is trained.

    Args:
        prompts: The prompts, put as the data put theirs; None takes the first of the validation
            data.
    """

    def __init__(self, prompts: Sequence[str] | None = None) -> None:
        self.prompts = prompts
        self._rows: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._written: set[tuple[int, str]] = set()
        self._latest: tuple[int, list[str]] = (-1, [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts with the model as it is, unless the fit is resumed."""
        self._rows = [] if trainer.fast_dev_run else self._find_prompts(trainer)  # type: ignore[attr-defined]
        self._latest = (-1, [])
        # Every rank takes part in finding the folder.
        folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(folder) if trainer.is_global_zero else None
        if self._rows and self._folder is not None:
            kept = _keep_until(self._folder / SAMPLES_FILE, trainer.global_step)
            self._written = {(record["step"], record["moment"]) for record in kept}
        if trainer.global_step == 0:
            self._sample(trainer, pl_module, BEFORE)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts with the model as it is now."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._sample(trainer, pl_module, DURING)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts a last time, and show the texts beside those before the fit."""
        self._sample(trainer, pl_module, AFTER)

    def _find_prompts(self, trainer: Trainer) -> list[dict[str, Any]]:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "sample_prompts"):
            return []
        rows: list[dict[str, Any]] = datamodule.sample_prompts(self.prompts)
        return rows

    def _sample(self, trainer: Trainer, module: Any, moment: str) -> None:
        if not self._rows:
            return
        step = trainer.global_step
        if self._latest[0] != step:
            self._latest = (step, self._generate(trainer, module))
        if self._folder is None:
            return
        prompts = [str(row["prompt"]) for row in self._rows]
        pairs = list(zip(prompts, self._latest[1], strict=True))
        file = self._folder / SAMPLES_FILE
        # A checkpoint from before a validation has that validation done again.
        if (step, moment) not in self._written:
            self._written.add((step, moment))
            _append(file, pairs, moment, step, trainer.current_epoch)
        for logger in trainer.loggers:
            _log(logger, pairs, step)
        before = _texts_before(file) if moment == AFTER else []
        _show(pairs, f"Samples {moment} (step {step})", before)

    def _generate(self, trainer: Trainer, module: Any) -> list[str]:
        decoding = module.decoding.greedy()
        decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, _LONGEST))
        collate = PromptCollator(module.tokenizer.pad_token_id)
        texts: list[str] = []
        generate = module.generate
        if isinstance(trainer.strategy, FSDP2Strategy):
            generate = partial(trainer.strategy.through_root, "generate")
        with _evaluating(module), trainer.precision_plugin.forward_context():
            for first in range(0, len(self._rows), _AT_A_TIME):
                rows = self._rows[first : first + _AT_A_TIME]
                batch = collate([{**row, "row": n} for n, row in enumerate(rows)])
                for name in ("input_ids", "attention_mask"):
                    batch[name] = batch[name].to(module.device)
                texts += generate(batch, decoding)
        return texts


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Run without dropout and gradients, and leave every part in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _append(
    file: Path, pairs: Sequence[tuple[str, str]], moment: str, step: int, epoch: int
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        for prompt, text in pairs:
            record = {
                "step": step,
                "epoch": epoch,
                "moment": moment,
                "prompt": prompt,
                "generation": text,
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after the checkpoint that a fit is resumed from; all, if it is new."""
    if not file.exists():
        return []
    kept = [line for line in _records(file) if 0 < step >= line["step"] and line["moment"] != AFTER]
    with replacing_file(file) as stream:
        for record in kept:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return kept


def _records(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.endswith("\n")]


def _texts_before(file: Path) -> list[str]:
    """The texts before the fit, which a fit that was resumed has not generated itself."""
    return [record["generation"] for record in _records(file) if record["moment"] == BEFORE]


def _log(logger: Any, pairs: Sequence[tuple[str, str]], step: int) -> None:
    if hasattr(logger, "log_text"):
        data = [[prompt, text] for prompt, text in pairs]
        logger.log_text(key="samples", columns=["prompt", "generation"], data=data, step=step)
    elif hasattr(logger.experiment, "add_text"):
        for number, (prompt, text) in enumerate(pairs):
            body = f"**{prompt}**\n\n{text}"
            logger.experiment.add_text(f"samples/{number}", body, global_step=step)


def _show(pairs: Sequence[tuple[str, str]], title: str, before: Sequence[str]) -> None:
    from rich import box, print
    from rich.table import Table
    from rich.text import Text

    compared = len(before) == len(pairs)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
    for heading in ("prompt", "before", "after") if compared else ("prompt", "generated"):
        table.add_column(heading, overflow="fold")
    for number, (prompt, text) in enumerate(pairs):
        cells = [prompt, before[number], text] if compared else [prompt, text]
        table.add_row(*(Text(_shortened(cell)) for cell in cells))
    print(table)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
