"""The subcommands `lightning-lora export` and `convert`: adapters from one format to another.

The options are read without torch, so that `--help` and mistakes in them are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.cli_configs import PlainParser
from lightning_lora.cli_merge import free_folder

EXPORT = "export"
_EXPORT = """\
Write a checkpoint's adapter as a folder in PEFT's format: adapter_config.json,
adapter_model.safetensors, a model card (README.md) with settings, data and scores as the checkpoint
and its run tell them, and the base's tokenizer where it is on this machine. The base's weights are
not needed. What PEFT cannot express is refused, with the reason.
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
    parser = PlainParser(
        prog=f"lightning-lora {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--dry_run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
