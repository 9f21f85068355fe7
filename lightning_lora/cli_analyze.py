"""The subcommand `lightning-lora analyze`: section 7 of the LoRA paper on one's own adapters.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lora.cli_configs import command_parser
from lightning_lora.cli_progress import progress_line
from lightning_lora.errors import ConfigError

if TYPE_CHECKING:
    from lightning_lora.study import Study

ANALYZE = "analyze"
_SIDES = ("A", "B", "input", "output")
_DESCRIPTION = """\
What adapters have learned, after section 7 of LoRA (arXiv:2106.09685): norm, effective rank and
spectrum of the update dW = s B A of each layer; how much the directions of several adapters have
in common (Figures 3 and 4); and, with --base, how dW stands to the weights W (Table 7, Figure 8).
"""
_EPILOG = """\
Written to the output folder: layers.csv, singular_values.csv, similarity.csv, similarity_grid.csv,
base.csv, base_grid.csv, analysis.json, and the figures as PNG files. Other files there stay.

Adapters of one seed start with the same rows of A and see the data in the same order, and are more
alike for that alone: compare adapters of different seeds.

Try:  lightning-lora analyze r8.ckpt r64.ckpt --base FOLDER --output analysis
"""


def run_analyze(arguments: Sequence[str]) -> None:
    """Carry out `analyze`.

    Args:
        arguments: What was typed after `analyze`.

    Raises:
        LightningLoRAError: For every mistake in arguments and files.
    """
    options = _parser().parse_args(arguments)
    paths = [Path(path) for path in options.checkpoints]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("A checkpoint is given twice. Give each once.")
    if options.directions < 1:
        raise ConfigError(f"--directions is {options.directions}. Give a number from 1 on.")
    folder = Path(options.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file. Give a folder.")
    from lightning_lora.adapters import labels_of, read_adapter
    from lightning_lora.base_weights import BaseWeights
    from lightning_lora.study import make_study
    from lightning_lora.study_files import as_json, write_study

    base = None if options.base is None else BaseWeights(_folder_of(options.base))
    adapters = {
        label: read_adapter(path) for label, path in zip(labels_of(paths), paths, strict=True)
    }
    study = make_study(
        adapters,
        base,
        options.of,
        options.directions,
        options.seed,
        progress=progress_line("layer"),
    )
    try:
        written = write_study(study, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from error
    if options.json:
        print(json.dumps(as_json(study) | {"files": [str(path) for path in written]}, indent=2))
    else:
        _print(study)
        print(f"Wrote {len(written)} files to {folder}: {', '.join(p.name for p in written)}")


def _folder_of(base: str) -> str:
    if not base.startswith("bundled:"):
        return base
    from lightning_lora.recipes.pretrained import resolve_model

    return resolve_model(base)


def _print(study: Study) -> None:
    from lightning_lora.cli_tables import print_table
    from lightning_lora.names import shortened
    from lightning_lora.study_files import mean_rows

    for label, found in study.spectra.items():
        names = shortened([each.layer for each in found])
        print_table(
            f"{label}: the update of each layer",
            ("layer", "r", "|dW|", "rms", "largest", "effective rank", "for 90 %"),
            [
                (
                    name,
                    str(each.r),
                    f"{each.delta_norm:.4g}",
                    f"{each.delta_rms:.3g}",
                    f"{each.spectral_norm:.4g}",
                    f"{each.effective_rank:.1f}",
                    str(each.directions_90),
                )
                for name, each in zip(names, found, strict=True)
            ],
        )
    if study.similarities:
        print_table(
            f"phi(i, j) of {study.side}, mean over layers (random: what is expected of chance)",
            ("adapters", "phi(1,1)", "random", "phi(1,all)", "random", "phi(k,k)", "random"),
            [
                (
                    f"{first}, {second}",
                    *(
                        f"{row[f'{kind}_{place}']:.3f}"
                        for place in ("1_1", "1_all", "k_k")
                        for kind in ("phi", "expected")
                    ),
                )
                for (first, second), row in mean_rows(study).items()
            ],
        )
    for label in study.labels:
        rows = [row for row in study.base if row.label == label]
        if rows:
            print_table(
                f"{label}: W on the first directions of dW, of W and of random matrices",
                ("layer", "|W|", "dW", "W", "random", "amplification", "4 of dW in W's tenth"),
                [
                    (
                        name,
                        f"{row.numbers.weight_norm:.4g}",
                        f"{row.numbers.on_delta:.4g}",
                        f"{row.numbers.on_weight:.4g}",
                        f"{row.numbers.on_random:.4g}",
                        f"{row.numbers.amplification:.3g}",
                        f"{row.overlap.first_in_tenth:.2f} (random {row.overlap.expected:.2f})",
                    )
                    for name, row in zip(shortened([r.layer for r in rows]), rows, strict=True)
                ],
            )
    for label, layer, reason in study.left_out:
        print(f"Left out: {layer} of {label}: {reason}")
    for note in study.notes:
        print(f"Note: {note}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(ANALYZE, _DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help="a checkpoint, a sharded folder, or a folder in PEFT format",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="the base model's folder of safetensors files"
    )
    parser.add_argument(
        "--of",
        choices=_SIDES,
        default="A",
        help="what directions are compared: of the factor A (default, as in the paper) or B, or "
        "those of dW in the layer's input or output",
    )
    parser.add_argument(
        "--directions",
        type=int,
        default=64,
        metavar="N",
        help="how many directions are compared at most (default: 64)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random matrices (default: 0)"
    )
    parser.add_argument(
        "--output", default="analysis", metavar="FOLDER", help="where to write (default: analysis)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser
