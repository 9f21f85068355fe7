"""What `lightning-lora plan` does once its options are known: read the config, count, and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from typing_extensions import override

from lightning_lora.cli_run import LoRACLI
from lightning_lora.errors import ConfigError
from lightning_lora.memory import GIB, RankMemory
from lightning_lora.recipes.forecast import Forecast, Precision, Row, make_forecast
from lightning_lora.recipes.recipe import RecipeModule

_LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


class PlanCLI(LoRACLI):
    """Read a config as `fit` does, and build of it what loads nothing: model, data and LoRA.

    Args:
        arguments: `fit` and its arguments, with configs by their paths.

    Raises:
        LightningLoRAError: For every mistake in arguments, files and settings.
    """

    @override
    def before_instantiate_classes(self) -> None:
        """Leave out where a fit would write."""
        lora, trainer = self._settings["lora"], self._settings["trainer"]
        lora["export_dir"], lora["merge_from"] = None, "last"
        # Callbacks and loggers may make folders, and none of these is needed.
        trainer["callbacks"] = trainer["logger"] = trainer["plugins"] = None
        trainer["strategy"] = "auto"

    @override
    def instantiate_classes(self) -> None:
        """Build no trainer."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: `forecast` is asked for."""

    def forecast(self, gpus: Sequence[int]) -> Forecast:
        """Count the memory of a rank.

        Args:
            gpus: Numbers of GPUs.

        Raises:
            ConfigError: If the model is none of the recipes', or the precision is unknown.
        """
        if not isinstance(self.model, RecipeModule):
            raise ConfigError(
                f"model.class_path is {type(self.model).__name__}, which is none of the recipes: "
                "the plan builds models without weights only for these and for classes derived "
                "from them."
            )
        trainer, lora = self._settings["trainer"], self._get(self.config_init, "lora")
        return make_forecast(
            self.model,
            self.datamodule,
            lora.config,
            lora.frozen_dtype,
            Precision.of(trainer["precision"]),
            accumulates=trainer["accumulate_grad_batches"] > 1,
            device="cpu" if trainer["accelerator"] == "cpu" else "cuda",
            ranks=gpus,
        )


def as_json(forecast: Forecast, memory: float) -> str:
    """Return a forecast as JSON, with all sizes in bytes.

    Args:
        forecast: What was counted.
        memory: GiB of a GPU.
    """
    return json.dumps(
        {
            "targets": [target.name for target in forecast.plan.targets],
            "parameters": {
                method: {"trained": trained, "total": total}
                for method, (trained, total) in forecast.parameters.items()
            },
            "batch": asdict(forecast.batch),
            "precision": forecast.precision.name,
            "optimizer": forecast.optimizer.name,
            "memory_per_gpu": memory * GIB,
            "rows": [
                {
                    "method": row.method,
                    "gpus": row.ranks,
                    "strategy": row.strategy if row.ranks > 1 else None,
                    **{name: round(size) for name, size in asdict(row.memory).items()},
                    "total": round(row.memory.total),
                    "fits": row.memory.fits(memory * GIB),
                }
                for row in forecast.rows
            ],
            "notes": list(forecast.notes),
        },
        indent=2,
    )


def print_forecast(forecast: Forecast, memory: float) -> None:
    """Print what is adapted, a table of the memory of a rank, and what was assumed.

    Args:
        forecast: What was counted.
        memory: GiB of a GPU.
    """
    print(forecast.plan)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    batch = forecast.batch
    packed = " (packed)" if batch.packed else ""
    small = max(row.memory.total for row in forecast.rows) < GIB
    unit, size = ("MiB", GIB // 2**10) if small else ("GiB", GIB)
    title = (
        f"Memory of a GPU in {unit}: batches of {batch.rows} x {batch.tokens} tokens{packed}, "
        f"{forecast.precision.name}, {forecast.optimizer.name}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("GPUs", "weights", "grads", "optim", "activ", "comm", "work", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"fits {memory:g}")
    table_method = None
    for (method, _, _), group in groupby(forecast.rows, key=_alike):
        rows = list(group)
        if method != table_method:
            table.add_section()
            table_method = method
        cells = [_shown(value / size) for value in _sizes(rows[0].memory)]
        gpus = ",".join(str(row.ranks) for row in rows)
        table.add_row(_label(rows[0]), gpus, *cells, rows[0].memory.fits(memory * GIB))
    Console(width=100, color_system=None).print(table)
    print(
        "activ: kept for backward. comm: gradient buckets (DDP), gathered layers (FSDP). work: "
        "temporaries.\nfits: yes leaves 10 % and 1 GiB for what is not counted (CUDA context, "
        "fragmentation); tight\nleaves less. QLoRA is counted with NF4 and double quantization."
    )
    for note in forecast.notes:
        print(f"Note: {note}")


def _alike(row: Row) -> tuple[str, str, RankMemory]:
    """What rows have in common that are shown as one: DDP needs the same on any number of GPUs."""
    return row.method, row.strategy if row.ranks > 1 else "", row.memory


def _label(row: Row) -> str:
    return _LABELS[row.method] + (f" {row.strategy.upper()}" if row.ranks > 1 else "")


def _sizes(memory: RankMemory) -> tuple[float, ...]:
    return (
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.communication,
        memory.working,
        memory.total,
    )


def _shown(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
