"""The model card of an adapter: the README.md that the Hugging Face hub shows.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.history import metrics_files, read_history

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[A-Za-z][\w.-]*")
_RUN_CONFIG = "config.yaml"
# What PEFT's task types are to the hub, and the class that loads such a model.
_TASKS = {
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
}
# Settings of a fit that a reader wants to know, where the hyperparameters have them.
_TRAINING = (
    *("learning_rate", "weight_decay", "schedule", "warmup", "lora_plus_ratio", "label_smoothing"),
    *("dtype", "quantization", "class_names", "problem_type"),
)


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        base: Name or folder of the base.
        config: The ``adapter_config.json``.
        settings: The settings of LoRA.
        parameters: How many parameters the adapter holds.
        training: Settings of the fit, by name.
        data: The data module and its settings, by name.
        scores: Metrics of the weights that the adapter holds, by name.
        position: ``epoch`` and ``global_step`` of the checkpoint, where it is one.
    """

    base: str | None
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    parameters: int
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    position: Mapping[str, int] = field(default_factory=dict)


def write_card(card: Card, folder: Path, kept: Path) -> None:
    """Write a card, or keep the one that a user may have written.

    Args:
        card: What it says.
        folder: Where it goes.
        kept: The folder that `folder` takes the place of; its card stays where it has one.
    """
    earlier = kept / CARD
    text = earlier.read_bytes() if earlier.is_file() else card_text(card).encode()
    (folder / CARD).write_bytes(text)


def card_text(card: Card) -> str:
    """The card in Markdown, with the metadata that the hub reads in front."""
    task, auto_class = _TASKS.get(str(card.config.get("task_type")), (None, None))
    on_hub = card.base if card.base and _is_hub_name(card.base) else None
    tags = ["lora", "peft", "lightning-lora", "pytorch-lightning"]
    head = [f"base_model: {on_hub}"] if on_hub else []
    head += ["library_name: peft"]
    if task:
        head.append(f"pipeline_tag: {task}")
    if on_hub:
        tags.append(f"base_model:adapter:{on_hub}")
    head += ["tags:", *(f"- {tag}" for tag in tags)]
    parts = ["\n".join(["---", *head, "---"]), "# LoRA adapter", _introduction(card)]
    parts += _section("Scores", {k: f"{v:.4g}" for k, v in card.scores.items()}, "metric")
    shown = {k: v for k, v in card.settings.items() if v not in (None, False)}
    parts += _section("LoRA", shown, "setting")
    parts += _section("Training", card.training, "setting")
    parts += _section("Data", card.data, "setting")
    parts += ["## Use", _usage(card, auto_class)]
    return "\n\n".join(parts) + "\n"


def facts_of_run(
    checkpoint: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """What a checkpoint and the files of its run say of the fit.

    Args:
        checkpoint: The Lightning checkpoint.
        path: Where it lies; the run's `metrics.csv` and `config.yaml` are looked for beside it and
            in the folder above.

    Returns:
        Settings of the fit, the data's settings, and the validation's scores at its step.
    """
    training = training_settings(checkpoint.get("hyper_parameters", {}))
    data = data_settings(checkpoint.get("datamodule_hyper_parameters", {}))
    scores: dict[str, float] = {}
    for run in (path.parent, path.parent.parent):
        data = data or _data_of_config(run / _RUN_CONFIG)
        files = metrics_files(run)
        if files and not scores:
            scores = {
                name: point.value
                for name, points in read_history(files).items()
                for point in points
                if point.step == checkpoint.get("global_step") and not name.startswith("lr")
            }
    return training, data, scores


def training_settings(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of a LightningModule's hyperparameters."""
    found = {key: hyperparameters.get(key) for key in _TRAINING}
    return {key: value for key, value in found.items() if value is not None}


def data_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader wants to know of a data module's settings."""
    return {
        key: value
        for key, value in settings.items()
        if value not in (None, False) and not key.startswith("_")
    }


def _data_of_config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    if not isinstance(written, dict):
        return {}
    return data_settings({"class": written.get("class_path"), **written.get("init_args", {})})


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _shown(base: str) -> str:
    """A base without the folders that are nobody's business."""
    return Path(base).name if Path(base).is_absolute() else base


def _introduction(card: Card) -> str:
    where = f" for `{_shown(card.base)}`" if card.base else ""
    position = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in card.position.items())
    after = f", saved after {position}" if position else ""
    return (
        f"A LoRA adapter{where} in PEFT's format, {card.parameters:,} parameters{after}. Trained "
        "with [lightning-lora](https://pypi.org/project/lightning-lora/)."
    )


def _section(title: str, rows: Mapping[str, Any], column: str) -> list[str]:
    if not rows:
        return []
    lines = [f"| {column} | value |", "| --- | --- |"]
    for name, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in (name, text))
        lines.append(f"| {' | '.join(cells)} |")
    return [f"## {title}", "\n".join(lines)]


def _usage(card: Card, auto_class: str | None) -> str:
    base = card.base if card.base and _is_hub_name(card.base) else "BASE"
    loader = auto_class or "AutoModel"
    classes = card.training.get("class_names")
    labels = f", num_labels={len(classes)}" if classes else ""
    return (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("{base}"{labels})\n'
        'model = PeftModel.from_pretrained(model, "this folder")\n'
        "```"
    )
