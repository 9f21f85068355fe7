"""The subcommand `lightning-lora plan`: what would be adapted, and the memory that it will need.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_lora.cli_configs import command_parser
from lightning_lora.cli_paths import complete_arguments
from lightning_lora.errors import ConfigError

PLAN = "plan"
_DESCRIPTION = """\
What would be adapted, and the memory that a rank will need for full fine-tuning, LoRA and QLoRA:
counted from the model's config alone. No weights and no data are read.
"""
_EPILOG = """\
Everything else is as for fit: --config CONFIG, and --KEY VALUE to override a key of the config.

Try:  lightning-lora plan --config instruct --gpus 1,8 --memory 24 --data.batch_size 16
"""


def run_plan(arguments: Sequence[str]) -> None:
    """Carry out `plan`.

    Args:
        arguments: What was typed after `plan`.

    Raises:
        LightningLoRAError: For every mistake in arguments, files and settings.
    """
    options, rest = _parser().parse_known_args(arguments)
    gpus, memory = _gpus(options.gpus), _memory(options.memory)
    completed = complete_arguments([PLAN, *rest], (PLAN,))
    from lightning_lora.cli_plan_run import PlanCLI, as_json, print_forecast

    # The keys are those of a fit.
    found = PlanCLI(["fit", *completed[1:]]).forecast(gpus)
    if options.json:
        print(as_json(found, memory))
    else:
        print_forecast(found, memory)


def _gpus(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--gpus is {text!r}. Give numbers of GPUs from 1 on, with commas between them, as in "
            "--gpus 1,2,8."
        )
    return sorted({int(part) for part in parts})


def _memory(text: str) -> float:
    try:
        memory = float(text)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise ConfigError(
            f"--memory is {text!r}. Give the memory of one GPU in GiB, above 0, as in --memory 24."
        )
    return memory


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        PLAN,
        _DESCRIPTION,
        epilog=_EPILOG,
        usage=f"lightning-lora {PLAN} --config CONFIG [--gpus N,N] [--memory GiB] [--json] "
        "[--KEY VALUE ...]",
    )
    parser.add_argument(
        "--gpus", default="1,2,4,8", metavar="N,N", help="numbers of GPUs (default: 1,2,4,8)"
    )
    parser.add_argument(
        "--memory", default="80", metavar="GiB", help="memory of one GPU (default: 80)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all sizes in bytes")
    return parser
