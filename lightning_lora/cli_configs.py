"""The subcommand `lightning-lora configs`: list, show and copy what is bundled.

It reads YAML files as text and imports no torch, so that it answers at once.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_lora.cli_paths import bundled_configs, find_bundled, near_config
from lightning_lora.errors import ConfigError
from lightning_lora.files import replacing_file

_WIDTH = 96
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z])")


def run_configs(arguments: Sequence[str]) -> None:
    """Carry out `configs list`, `configs show NAME` or `configs copy NAME DEST`.

    Args:
        arguments: What was typed after `configs`.

    Raises:
        ConfigError: If the arguments are not understood, there is no such config, or the copy
            cannot be written.
    """
    parsed = _parser().parse_args(arguments)
    if parsed.action == "list":
        print(listing())
    elif parsed.action == "show":
        print(_bundled(parsed.name).read_text(encoding="utf-8"), end="")
    else:
        written = copy_config(parsed.name, parsed.dest, parsed.force)
        print(f"Wrote {written}. Edit it, then: lightning-lora fit --config {written}")


def listing() -> str:
    """Return what each bundled config is and what it needs, as text."""
    entries = []
    for name in bundled_configs():
        title, needs = describe(_bundled(name).read_text(encoding="utf-8"))
        lines = [
            textwrap.fill(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
            for text in (title, needs)
            if text
        ]
        entries.append("\n".join([name, *lines]))
    closing = (
        "Run one:           lightning-lora fit --config NAME\n"
        "Read one:          lightning-lora configs show NAME\n"
        "Make it your own:  lightning-lora configs copy NAME FILE"
    )
    return "\n\n".join([*entries, closing])


def describe(text: str) -> tuple[str, str]:
    r"""Return what a config is and what it needs, from the comment that it begins with.

    Args:
        text: The config. Its first paragraph of comments says what it is; the sentence that begins
            with "Needs" says what it takes.

    Example:
        >>> describe("# Sentiment.\n#\n# Needs a GPU and\n# 1 GB. Expect .95.\nmodel: null\n")
        ('Sentiment.', 'Needs a GPU and 1 GB.')
    """
    comments: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    paragraphs = [" ".join(part.split()) for part in "\n".join(comments).split("\n\n")]
    sentences = [s for paragraph in paragraphs for s in _SENTENCE_END.split(paragraph)]
    needs = next((sentence for sentence in sentences if sentence.startswith("Needs ")), "")
    return paragraphs[0], needs


def copy_config(name: str, dest: str, force: bool = False) -> Path:
    """Copy a bundled config.

    Args:
        name: The config's name.
        dest: The file to write, or a folder to write it into under its own name: one that is
            there, or a name that ends in a slash.
        force: Whether a file that is there is overwritten.

    Returns:
        The file that was written.

    Raises:
        ConfigError: If there is no such config, the file is there, or it cannot be written.
    """
    source = _bundled(name)
    target = Path(dest).expanduser()
    if target.is_dir() or dest.endswith("/"):
        target = target / source.name
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already. Give another name, or overwrite: --force.")
    try:
        with replacing_file(target) as fresh:
            fresh.write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target


def _bundled(name: str) -> Path:
    found = find_bundled(name)
    if found is None:
        raise ConfigError(
            f"There is no bundled config {name}{near_config(name)}. Bundled are: "
            f"{', '.join(bundled_configs())}."
        )
    return found


class PlainParser(argparse.ArgumentParser):
    """Raises what it has to complain about, so that it is said like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ConfigError`."""
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")


def command_parser(name: str, description: str, **options: Any) -> PlainParser:
    """A parser for the options of a subcommand, without abbreviations; texts stay as they are set.

    Args:
        name: What is typed after ``lightning-lora``.
        description: What ``--help`` says first.
        **options: Further arguments of `argparse.ArgumentParser`.
    """
    return PlainParser(
        prog=f"lightning-lora {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("configs", "The configs in the package.")
    actions = parser.add_subparsers(dest="action", metavar="{list,show,copy}", required=True)
    actions.add_parser("list", help="name each config, say what it is and what it needs")
    show = actions.add_parser("show", help="print a config")
    copy = actions.add_parser("copy", help="write a config to a file of your own")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="a name from the list")
    copy.add_argument("dest", metavar="DEST", help="a file, or a folder to put it into")
    copy.add_argument("--force", action="store_true", help="overwrite a file that is there")
    return parser
