"""Errors of the argument parser in plain words: which key, in which file and line, what is near."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_lora.errors import ConfigError

_UNKNOWN = (
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
)
_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<reason>((?!Parser key ).)*)', re.DOTALL)
_EXPECTED = re.compile(
    r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?(Literal\[[^\]]*\]|\w+))"
)
_CLASS = re.compile(r"'class_path': '(?P<name>[^']+)'")


class ExplainingParser(LightningArgumentParser):
    """A parser that raises `ConfigError` with a message for people in place of exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the explained error; parsers inside a parser report to the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise ParsingError(message)


class ParsingError(Exception):
    """A message of the parser's, on its way to be explained."""


def explain(message: str, parser: Any, arguments: Sequence[str]) -> ConfigError:
    """Turn a message of the parser's into one that says what to change.

    Args:
        message: What jsonargparse says.
        parser: The subcommand's parser, for the keys that there are.
        arguments: The arguments as given; the configs they name are searched for the mistake.
    """
    text = message.strip()
    section = _section_of(text)
    files = _configs(arguments)
    for pattern in _UNKNOWN:
        match = pattern.search(text)
        if match is not None:
            return _unknown_key(match["key"], section, parser, arguments)
    class_name = _CLASS.search(text)
    if class_name is not None and "import path" in text:
        return _unknown_class(class_name["name"], section or "model", arguments)
    if _VALUE.search(text) is not None:
        return _wrong_value(text, section, arguments)
    if "arguments are required" in text:
        missing = text.rsplit(":", 1)[-1].strip()
        return ConfigError(
            f"The config has no {missing.split('.')[-1]!r} section: add it, as in the bundled "
            "configs, or give --config."
        )
    if text.startswith(("Problems parsing config", "Unexpected config")):
        names = ", ".join(str(file) for file in files)
        reason = text.removeprefix("Problems parsing config:").replace(
            'in "<unicode string>", ', ","
        )
        return ConfigError(f"{names} is no YAML file of sections and keys: {_one_line(reason)}")
    return ConfigError(_one_line(text))


def place_of(key: str, arguments: Sequence[str]) -> str:
    """Say where a key was given: `" (my.yaml, line 7)"`, or nothing where it is not found."""
    typed = {argument.partition("=")[0].replace(".init_args.", ".") for argument in arguments}
    if f"--{key}" in typed:
        return " (command line)"
    for file in _configs(arguments):
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        line = _line_of(node, key.split("."))
        if line is not None:
            return f" ({file}, line {line + 1})"
    return ""


def _configs(arguments: Sequence[str]) -> list[Path]:
    pairs = itertools.pairwise(arguments)
    return [Path(value) for option, value in pairs if option == "--config"]


def _line_of(node: Any, path: list[str]) -> int | None:
    """Find a key; a section's arguments may lie deeper in it, below `init_args`."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in node.value:
        if key.value == path[0]:
            return key.start_mark.line if len(path) == 1 else _line_of(value, path[1:])
    if len(path) > 1:
        return None
    deeper = (_line_of(value, path) for _, value in node.value)
    return next((line for line in deeper if line is not None), None)


def _section_of(text: str) -> str | None:
    match = re.search(r"Parser key \"(?:\w+\.)?(model|data|trainer|lora)[\w.]*\"", text)
    return match[1] if match else None


def _unknown_key(
    key: str, section: str | None, parser: Any, arguments: Sequence[str]
) -> ConfigError:
    section = section or next((s for s in ("model", "data") if key.startswith(f"{s}.")), None)
    if section in ("model", "data"):
        bare = key.removeprefix(f"{section}.").removeprefix("init_args.")
        known = [f"{section}.{name}" for name in _arguments_of(section, arguments)]
        key = f"{section}.{bare}"
    else:
        known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    message = f"Unknown key {key!r}{place_of(key, arguments)}"
    if matches:
        message += f"; did you mean {matches[0]!r}?"
    elif section in ("model", "data") and known:
        message += f". Known are: {', '.join(known)}."
    else:
        message += ". `lightning-lora fit --help` lists the keys."
    return ConfigError(message)


def constructor_arguments(cls: type) -> list[str]:
    """Return the arguments of a class, with those that `**kwargs` pass on to its bases.

    >>> class Base:
    ...     def __init__(self, size: int) -> None: ...
    >>> class Derived(Base):
    ...     def __init__(self, name: str, **kwargs: int) -> None: ...
    >>> constructor_arguments(Derived)
    ['name', 'size']
    """
    names: list[str] = []
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(names))


def _arguments_of(section: str, arguments: Sequence[str]) -> list[str]:
    import lightning_lora.recipes as recipes

    for file in reversed(_configs(arguments)):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        entry = content.get(section) if isinstance(content, dict) else None
        if isinstance(entry, dict) and "class_path" in entry:
            cls = getattr(recipes, str(entry["class_path"]).rsplit(".", 1)[-1], None)
            return [] if cls is None else constructor_arguments(cls)
    return []


def _unknown_class(name: str, section: str, arguments: Sequence[str]) -> ConfigError:
    import lightning_lora.recipes as recipes

    matches = difflib.get_close_matches(name.rsplit(".", 1)[-1], recipes.__all__, n=1)
    near = f" (did you mean {matches[0]!r}?)" if matches else ""
    return ConfigError(
        f"{section}.class_path{place_of(f'{section}.class_path', arguments)} is {name!r}, which is "
        f"no known class{near}. Give one of {', '.join(recipes.__all__)}, or the import path of a "
        "class of your own, as in my_module.MyModule."
    )


def _wrong_value(text: str, section: str | None, arguments: Sequence[str]) -> ConfigError:
    innermost = list(_VALUE.finditer(text))[-1]
    key, reason = innermost["key"], innermost["reason"]
    if section and not key.startswith(section):
        key = f"{section}.{key}"
    place = place_of(key, arguments)
    # Unions nest, and the inner one is the value's; its last line repeats the value.
    reason, found, value = reason.partition("Given value: ")
    expected = _EXPECTED.findall(reason)
    given = re.search(r"Got value: (.*)", reason)
    shown = given[1] if given else value.split("\n")[0]
    if not expected or not (given or found):
        return ConfigError(f"Wrong value for {key!r}{place}: {_one_line(reason)}")
    if given:
        expected = expected[:1]
    kinds = " or ".join(dict.fromkeys(a or b for a, b in expected)).replace("NoneType", "null")
    return ConfigError(f"Wrong value for {key!r}{place}: expected {kinds}, got {shown.strip()!r}.")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
