"""Generated texts into a file, in the order of the data, from all ranks."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.recipes.predictions import PredictionFileWriter, gather_rows, replacing_file

SUFFIXES = (".jsonl", ".csv", ".txt")


class GenerationWriter(PredictionFileWriter):
    """Writes prompts and what was generated after them when prediction ends.

    Args:
        path: A `.jsonl` or `.csv` file gets a line or record for each row of the data, equal
            prompts included, with `prompt` and `generation`. A `.txt` file gets one line for each
            different prompt, in the order in which they first occur: what E2E's
            `measure_scores.py` takes.

    Raises:
        ConfigError: If the suffix is another.
    """

    suffixes = SUFFIXES

    def write(self, trainer: Trainer, module: Any, predictions: Sequence[Any]) -> None:
        """Bring the ranks' texts together and write them on the first."""
        own = {
            row: (prompt, text)
            for batch in predictions
            for row, prompt, text in zip(
                batch["row"], batch["prompt"], batch["generation"], strict=True
            )
        }
        found = gather_rows(trainer, own)
        if trainer.is_global_zero:
            datamodule: Any = getattr(trainer, "datamodule", None)
            repeats = getattr(datamodule, "prompt_repeats", None)
            write_generations(self.path, found, None if repeats is None else repeats("predict"))


def write_generations(
    path: Path,
    generations: Mapping[int, tuple[str, str]],
    repeats: Sequence[int] | None = None,
) -> None:
    """Write texts to a file that appears only when it is complete.

    Args:
        path: A `.jsonl`, `.csv` or `.txt` file; its folder is made.
        generations: Prompt and text by the prompt's number.
        repeats: For each row of the data the number of its prompt; None where each has its own.
    """
    suffix = path.suffix.lower()
    order = sorted(generations)
    if repeats is not None and suffix != ".txt":
        order = [number for number in repeats if number in generations]
    with replacing_file(path) as stream:
        writer = csv.writer(stream)
        if suffix == ".csv":
            writer.writerow(["prompt", "generation"])
        for number in order:
            prompt, text = generations[number]
            if suffix == ".csv":
                writer.writerow([prompt, text])
            elif suffix == ".jsonl":
                record = {"prompt": prompt, "generation": text}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                stream.write(" ".join(text.split()) + "\n")
