"""The subcommands `lightning-lora export` and `convert`: adapters from one format to another.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.cli_configs import command_parser
from lightning_lora.cli_merge import free_folder
from lightning_lora.cli_progress import progress_line
from lightning_lora.errors import ConfigError

EXPORT, CONVERT = "export", "convert"
_EXPORT = """\
Write a checkpoint's adapter as a folder in PEFT's format: adapter_config.json,
adapter_model.safetensors, a model card (README.md) with settings, data and scores as the checkpoint
and its run tell them, and the base's tokenizer where it is on this machine. The base's weights are
not needed. What PEFT cannot express is refused, with the reason.
"""
_CONVERT = """\
Make a checkpoint (.ckpt) of an adapter in another format, for load_adapter, lightning-lora test
--ckpt_path and lightning-lora merge: a folder in PEFT's format, or a file of factors beside plain
tensors, with names ending in lora_A and lora_B (loralib) or lora_matrix_A and lora_matrix_B (the
article "Implementing LoRA from Scratch"). Of the plain tensors those count that differ from the
base's. The base is read once, for its fingerprint. The other way round: lightning-lora export.
"""


def run_export(arguments: Sequence[str]) -> None:
    """Carry out `export CKPT DIR`.

    Args:
        arguments: What was typed after `export`.

    Raises:
        LightningLoRAError: For every mistake in arguments and files.
    """
    parser = _parser(EXPORT, _EXPORT)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a sharded folder")
    parser.add_argument("directory", metavar="DIR", help="the folder to write; new or empty")
    parser.add_argument(
        "--base", metavar="FOLDER_OR_NAME", help="the base, where the checkpoint does not name it"
    )
    options = parser.parse_args(arguments)
    folder = free_folder(options.directory, options.force, "DIR")
    from lightning_lora.offline_export import prepare_export, write_export
    from lightning_lora.recipes.pretrained import resolve_model

    base = None if options.base is None else resolve_model(options.base)
    export = prepare_export(options.checkpoint, base)
    files = [] if options.dry_run else write_export(export, folder)
    found = {
        "adapter": str(export.adapter.path),
        "output": str(folder),
        "written": bool(files),
        "class": type(export.skeleton.model).__name__,
        "layers": len(export.skeleton.injection.plan.targets),
        "parameters": sum(tensor.numel() for tensor in export.adapter.state.values()),
        "files": [path.name for path in files],
    }
    _say(found, options, f"{found['layers']} adapted layers of {found['class']}")


def run_convert(arguments: Sequence[str]) -> None:
    """Carry out `convert SRC DST`.

    Args:
        arguments: What was typed after `convert`.

    Raises:
        LightningLoRAError: For every mistake in arguments and files.
    """
    parser = _parser(CONVERT, _CONVERT)
    parser.add_argument("source", metavar="SRC", help="a folder in PEFT format, or a file")
    parser.add_argument("target", metavar="DST", help="the checkpoint to write: adapter.ckpt")
    parser.add_argument(
        "--base",
        metavar="FOLDER_OR_NAME",
        help="the base, in safetensors files (default: the one that PEFT's folder names)",
    )
    parser.add_argument(
        "--alpha", type=float, metavar="N", help="numerator of the scaling alpha / r of a file"
    )
    parser.add_argument(
        "--scaling", type=float, metavar="S", help="the scaling itself, in the place of --alpha"
    )
    parser.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="the model's class in transformers (default: what SRC or the base's config says)",
    )
    parser.add_argument(
        "--part",
        default="model",
        metavar="PATH",
        help="where the LightningModule that will load it has the model (default: model, as in "
        "the recipes)",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="beginnings of the names of tensors to leave out",
    )
    options = parser.parse_args(arguments)
    if options.alpha is not None and options.scaling is not None:
        raise ConfigError("Give --alpha or --scaling, not both.")
    target = Path(options.target).expanduser()
    if target.is_dir():
        raise ConfigError(f"DST {target} is a folder. Give a file: {target / 'adapter.ckpt'}.")
    if target.exists() and not options.force:
        raise ConfigError(f"DST {target} is there already. Give another name, or replace: --force.")
    from lightning_lora.conversion import prepare_conversion, write_conversion
    from lightning_lora.recipes.pretrained import resolve_model

    conversion = prepare_conversion(
        options.source,
        None if options.base is None else resolve_model(options.base),
        part=options.part,
        class_name=options.class_name,
        alpha=options.alpha,
        scaling=options.scaling,
        skip=options.skip,
        progress=progress_line("reading"),
    )
    if not options.dry_run:
        write_conversion(conversion, target)
    metadata = conversion.checkpoint["lightning_lora"]
    state = conversion.checkpoint["state_dict"]
    config = metadata["config"]
    found = {
        "adapter": str(conversion.source),
        "form": conversion.form,
        "output": str(target),
        "written": not options.dry_run,
        "class": metadata["base"]["model"]["class"],
        "base": metadata["base"]["name_or_path"],
        "layers": len(metadata["targets"]),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "settings": {key: config[key] for key in _SHOWN},
        "files": [target.name],
    }
    settings = ", ".join(f"{k}={v}" for k, v in found["settings"].items() if v not in (None, False))
    _say(
        found,
        options,
        f"{found['form']}, {found['layers']} adapted layers of {found['class']}, {settings}",
    )


_SHOWN = ("r", "alpha", "bias", "train_layer_norms", "modules_to_save", "use_rslora")


def _say(found: Mapping[str, Any], options: argparse.Namespace, what: str) -> None:
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['adapter']}: {what}, {found['parameters']:,} parameters")
    if found["written"]:
        print(f"Wrote {', '.join(found['files'])} to {found['output']}")
    else:
        print(f"Nothing was written (--dry_run); without it, {found['output']} would be.")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
