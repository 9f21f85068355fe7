"""The subcommand `lightning-lora push`: an adapter or a merged model to the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.cli_configs import command_parser

PUSH = "push"
_DESCRIPTION = """\
Upload a folder to the Hugging Face hub: an adapter in PEFT's format (lightning-lora export, or the
`adapter` folder of a run) or a merged model (lightning-lora merge, or `merged`). Needs a login:
`hf auth login`, or HF_TOKEN.
"""


def run_push(arguments: Sequence[str]) -> None:
    """Carry out `push DIR NAME`.

    Args:
        arguments: What was typed after `push`.

    Raises:
        LightningLoRAError: For every mistake in arguments, files and login.
    """
    parser = command_parser(PUSH, _DESCRIPTION)
    parser.add_argument("directory", metavar="DIR", help="the folder to upload")
    parser.add_argument("name", metavar="NAME", help="user/name on the hub, or a name of your own")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry_run", action="store_true", help="list the files, upload nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from lightning_lora.hub import files_of, kind_of_folder, push_folder

    folder = Path(options.directory).expanduser()
    kind, files = kind_of_folder(folder), files_of(folder)
    address = None if options.dry_run else push_folder(folder, options.name, options.private)
    if options.json:
        print(json.dumps({"folder": str(folder), "kind": kind, "url": address, "files": files}))
        return
    print(f"{folder}: {kind}, {sum(files.values()):,} bytes in {', '.join(files)}")
    print("Nothing was uploaded (--dry_run)." if address is None else f"Uploaded to {address}")
