"""The subcommand `lightning-lora merge`: an adapter and its base to one folder.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.cli_configs import command_parser
from lightning_lora.cli_progress import progress_line
from lightning_lora.errors import ConfigError

if TYPE_CHECKING:
    from lightning_lora.layerwise import Merge

MERGE = "merge"
_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DESCRIPTION = """\
Merge an adapter into its base, W = W0 + s B A, and write a folder that transformers, vLLM and
llama.cpp's converter read. Weights are read, merged and written one after the other: the memory
that it takes is that of one file of the result, never that of the model.
"""
_EPILOG = """\
The fingerprint of the base in the checkpoint is compared with the base's files first, which reads
them once. An adapter that was trained on a quantized base is merged into the 16-bit or 32-bit
weights that were quantized. Tokenizer, chat template and generation config of the base come along;
class, labels and other settings of the model are those of the fit.

Try:  lightning-lora merge outputs/quickstart/version_0/checkpoints/best.ckpt --output merged
"""


def run_merge(arguments: Sequence[str]) -> None:
    """Carry out `merge`.

    Args:
        arguments: What was typed after `merge`.

    Raises:
        LightningLoRAError: For every mistake in arguments and files.
    """
    options = _parser().parse_args(arguments)
    shard = bytes_of(options.max_shard_size)
    output = free_folder(options.output, options.force)
    import torch

    from lightning_lora.offline_merging import prepare_merge, write_merge
    from lightning_lora.recipes.pretrained import resolve_model

    base = None if options.base is None else resolve_model(options.base)
    dtype = None if options.dtype is None else getattr(torch, _DTYPES[options.dtype])
    merge = prepare_merge(options.checkpoint, base, dtype, progress_line("checking"))
    files = []
    if not options.dry_run:
        files = write_merge(merge, output, shard, progress_line("merging"))
    found = _described(merge, output, files)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


def bytes_of(size: str) -> int:
    """Bytes of a size like `5GB`.

    Raises:
        ConfigError: It is no such size.

    >>> bytes_of("5GB"), bytes_of("200 mb")
    (5000000000, 200000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|KB|MB|GB)", size.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--max_shard_size {size!r} is no size. Give one like 5GB or 200MB.")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def free_folder(path: str, force: bool, option: str = "--output") -> Path:
    """A folder that may be written.

    Args:
        path: What was typed.
        force: Whether a folder that is there is replaced.
        option: What it was typed for.

    Raises:
        ConfigError: It is a file, or there and not empty.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file. Give a folder.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{option} {folder} is there already and not empty. Give another folder, or replace "
            "it: --force."
        )
    return folder


def _described(merge: Merge, output: Path, files: Sequence[Path]) -> dict[str, Any]:
    dtypes = {str(written).removeprefix("torch.") for _, written in merge.dtypes.values()}
    return {
        "adapter": str(merge.adapter.path),
        "base": str(merge.folder),
        "base_check": merge.check,
        "output": str(output),
        "written": bool(files),
        "class": type(merge.skeleton.model).__name__,
        "dtypes": sorted(dtypes),
        "layers_merged": merge.layers,
        "tensors_replaced": merge.replaced,
        "bytes": merge.size,
        "files": [path.name for path in files],
        "notes": list(merge.notes),
    }


def _print(found: dict[str, Any]) -> None:
    print(f"base     {found['base']} ({found['base_check']})")
    print(f"model    {found['class']}, {', '.join(found['dtypes'])}, {found['bytes']:,} bytes")
    print(
        f"adapter  {found['adapter']}: {found['layers_merged']} layers merged, "
        f"{found['tensors_replaced']} other tensors of its own"
    )
    for note in found["notes"]:
        print(f"Note: {note}")
    if found["written"]:
        print(f"Wrote {len(found['files'])} files to {found['output']}")
    else:
        print(f"Nothing was written (--dry_run); without it, {found['output']} would be.")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(MERGE, _DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a checkpoint, a sharded folder, or a folder in PEFT format",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to write; new or empty"
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER_OR_NAME",
        help="the base, in safetensors files (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        help="dtype of the result (default: that of the model in the fit; of a folder in PEFT "
        "format, that of the base's files)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="the largest file, and so the memory that it takes (default: 5GB)",
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
