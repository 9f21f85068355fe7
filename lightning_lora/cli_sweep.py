"""The subcommand `lightning-lora sweep`: a grid of fits, with baselines, as a table and a figure.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.cli_configs import command_parser
from lightning_lora.cli_paths import find_config
from lightning_lora.errors import ConfigError
from lightning_lora.sweep import BASELINES, Result, finished, make_grid, read_keys, run_grid

SWEEP = "sweep"
_DESCRIPTION = """\
Fit a config with every combination of values and every seed, as in Tables 5 and 6 of LoRA
(arXiv:2106.09685), each fit in a process of its own, and compare the best validation scores.
"""
_EPILOG = """\
  --KEY V,V,...   any key of fit, with one value or a list of values to vary. Values that hold
                  commas are parted by semicolons: --lora.target_modules "qv;[query,key,value]".
                  A value that begins with a bracket or a quote is one value.
  --BASELINE.KEY V
                  for one baseline alone: --full.model.learning_rate 0.0001

The keys of the section lora vary LoRA alone; all others are for the baselines too. linear_probe
trains the task's head, bitfit the head and all biases, full the whole model.

Written to the output folder: sweep.csv (a line a run), sweep.json, sweep.md, sweep.png (score over
trained parameters), and a folder for each run with its log. Runs that are finished are not carried
out again, and one that was interrupted goes on from its last checkpoint: run the same command once
more. A run that failed stands in the table, and is tried again. Of a finished run the best
checkpoint stays.

Try:  lightning-lora sweep --config quickstart --lora.r 1,4,16 --seeds 1,2 \\
          --baselines linear_probe,bitfit --trainer.max_epochs 2
"""


def run_sweep(arguments: Sequence[str]) -> None:
    """Carry out `sweep`.

    Args:
        arguments: What was typed after `sweep`.

    Raises:
        LightningLoRAError: The arguments are not understood, or the folder cannot be written.
        SystemExit: With code 1 if a run has failed, and 130 after an interruption.
    """
    options, rest = _parser().parse_known_args(arguments)
    config = find_config(options.config)
    baselines = [name for name in options.baselines.split(",") if name]
    grid = make_grid(config, read_keys(rest), _seeds(options.seeds), baselines)
    folder = Path(options.output or Path("sweeps") / Path(config).stem).expanduser()
    done = sum(finished(run, folder) is not None for run in grid)
    if options.dry_run:
        found = [
            {
                "name": run.name,
                "finished": finished(run, folder) is not None,
                "arguments": dict(run.arguments),
            }
            for run in grid
        ]
        if options.json:
            print(json.dumps({"output": str(folder), "runs": found}, indent=2))
            return
        for each in found:
            print(f"{'finished' if each['finished'] else 'to run'}  {each['name']}")
        print(f"{len(grid)} runs in {folder}, {done} finished. Nothing was run (--dry_run).")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = run_grid(grid, folder, _progress)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from error
    except KeyboardInterrupt:
        print("Interrupted. Run the same command to go on.", file=sys.stderr)
        raise SystemExit(130) from None
    _finish(results, folder, options.json)


def _finish(results: Sequence[Result], folder: Path, as_json_text: bool) -> None:
    from lightning_lora.cli_tables import print_table
    from lightning_lora.sweep_results import as_json, gather, table_of, write_sweep

    try:
        files = write_sweep(results, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from error
    if as_json_text:
        print(json.dumps(as_json(results) | {"files": [str(path) for path in files]}, indent=2))
    else:
        metric = next((result.metric for result in results if result.metric), "score")
        print_table("Best validation scores", *table_of(gather(results), metric))
        print(f"Wrote {', '.join(path.name for path in files)} to {folder}")
    failed = [result for result in results if result.error is not None]
    if failed:
        print(
            f"error: {len(failed)} of {len(results)} runs failed, the first of them with "
            f"{failed[0].error}. The logs are in {folder}; the same command tries them again.",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _progress(done: int, count: int, what: str) -> None:
    # Runs take minutes: each is worth a line, also in a log.
    print(f"run {done + 1}/{count}  {what}", file=sys.stderr, flush=True)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds is {text!r}. Give whole numbers with commas between: 1,2,3.")
    return list(dict.fromkeys(map(int, parts)))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        SWEEP,
        _DESCRIPTION,
        epilog=_EPILOG,
        usage=(
            "lightning-lora sweep --config CONFIG [--KEY V,V,...] [--seeds N,N] "
            "[--baselines NAME,NAME] [--output DIR] [--dry_run] [--json]"
        ),
    )
    parser.add_argument(
        "--config", "-c", required=True, metavar="CONFIG", help="a YAML file, or a bundled config"
    )
    parser.add_argument("--seeds", default="42", metavar="N,N", help="seeds (default: 42)")
    parser.add_argument(
        "--baselines",
        default="",
        metavar="NAME,NAME",
        help=f"what to compare with: {', '.join(BASELINES)}",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where to write (default: sweeps/NAME of the config)"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs, carry out none")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser
